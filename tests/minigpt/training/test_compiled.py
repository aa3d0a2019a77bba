"""The states before the head, compiled: one graph for every method, and the same numbers."""

from functools import partial
from typing import Any

import pytest
import torch

import peft_lite
from minigpt.generation import generate
from minigpt.models.llama import Llama, LlamaConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import checkpoint_activations, compile_states
from peft_lite import DoraConfig, IA3Config
from tests.peft_lite.peft_methods import GPT_NEO, OURS
from tests.tiny import batch, gpt_neo

METHODS: dict[str, dict[str, Any]] = {
    "gpt-neo": {name: {**GPT_NEO, **OURS}[name] for name in ("lora", "bias", "prefix", "prompt")},
    "llama": {
        "dora": DoraConfig(["k_proj", "down_proj"], r=3, lora_alpha=7),
        "ia3": IA3Config(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        "houlsby": OURS["houlsby"],
        "full": None,
        "checkpointed": None,
    },
}
CASES = [(kind, method) for kind, methods in METHODS.items() for method in methods]
TOLERANCE = 1e-5  # float32, through two blocks


def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = language_model_loss(model, batch(0))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile without its code generation: a graph that breaks is an error."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count, fullgraph=True))
    return graphs


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_method_is_one_graph(kind: str, method: str, compiler: list[int]) -> None:
    model = gpt_neo() if kind == "gpt-neo" else llama()
    if config := METHODS[kind][method]:
        peft_lite.attach(model, config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.05
    elif method == "checkpointed":
        checkpoint_activations(model.blocks)
    loss, plain = gradients(model)
    compile_states(model)
    again, compiled = gradients(model)
    assert len(compiler) == 1
    assert again == pytest.approx(loss, rel=TOLERANCE)
    assert compiled.keys() == plain.keys()
    for name, g in plain.items():
        torch.testing.assert_close(compiled[name], g, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_only_reads_the_model_is_not_compiled(compiler: list[int]) -> None:
    model = gpt_neo()
    ids = batch(0)["input_ids"][:, :4]
    expected = generate(model, ids, 4, temperature=0)
    compile_states(model)
    assert torch.equal(generate(model, ids, 4, temperature=0), expected)
    assert compiler == []
