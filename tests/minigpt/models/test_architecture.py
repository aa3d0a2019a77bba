"""A new architecture is one file and one line: here a decoder that the library does not know."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import minigpt
from minigpt.checkpoints.directory import outline
from minigpt.models.architecture import Architecture, Decoder
from minigpt.models.architectures import ARCHITECTURES
from minigpt.models.attention import Cache
from minigpt.models.names import Names
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import TrainConfig, train

# ---- the file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EchoConfig:
    vocab_size: int = 11
    max_position_embeddings: int = 24
    width: int = 6
    decay: tuple[float, ...] = (0.5,)
    tie_word_embeddings: bool = False


class Embeddings(nn.Module):
    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)


class Echo(Decoder):
    """Logits of W (x_t + d x_(t-1) + d^2 x_(t-2) + ...): a decaying sum of embeddings."""

    config: EchoConfig

    def __init__(self, config: EchoConfig, head: str = "causal-lm") -> None:
        super().__init__()
        self.config, self.head_kind = config, head
        self.names = NAMES.bare() if head == "none" else NAMES
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.head: nn.Module = nn.Identity()
        if head == "causal-lm":
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(self.initialize)
        self.tie()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(input_ids, attention_mask))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        x = self.embeddings.token(input_ids)
        if caches is not None:
            x = caches[0].append(x[:, None], x[:, None])[0][:, 0]
        distance = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
        weight = self.config.decay[0] ** distance.clamp(min=0) * (distance >= 0)
        return (weight @ x)[:, -input_ids.size(1) :]

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURE

    @property
    def max_tokens(self) -> int:
        return self.config.max_position_embeddings

    @property
    def unembedding(self) -> nn.Linear | None:
        return self.head if isinstance(self.head, nn.Linear) else None

    def new_caches(self, batch: int, slots: int) -> list[Cache]:
        return [Cache(batch, 1, slots, self.config.width, self.embeddings.token.weight)]

    def tie(self) -> None:
        if self.config.tie_word_embeddings and self.unembedding is not None:
            self.unembedding.weight = self.embeddings.token.weight

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight)


NAMES = Names({"embeddings.token": "echo.emb", "head": "out"}, prefix="echo.")


def read_decay(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"decay": (1 / raw["half"],)} if "half" in raw else {}


def write_decay(model: Echo) -> dict[str, Any]:
    return {"decay": list(model.config.decay), "half": 1 / model.config.decay[0]}


ARCHITECTURE = Architecture(
    model_type="echo",
    model=Echo,
    config=EchoConfig,
    names=NAMES,
    heads={"causal-lm": "EchoForCausalLM", "none": "EchoModel"},
    default="causal-lm",
    dropped={"none": ("head.",)},
    fixed={"flavour": "plain"},
    read=read_decay,
    write=write_decay,
)

# ---- the line -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "echo", ARCHITECTURE)


# ---- and what the library then does with it -----------------------------------------------------

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def model() -> Echo:
    torch.manual_seed(0)
    return Echo(EchoConfig(decay=(0.25,)))


def test_it_is_saved_and_loaded_under_its_own_names(model: Echo, tmp_path: Path) -> None:
    minigpt.save(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"echo.emb.weight", "out.weight"}
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"], raw["half"]) == (
        "echo",
        ["EchoForCausalLM"],
        4.0,
    )
    again = minigpt.load(tmp_path)
    assert isinstance(again, Echo)
    assert again.config == model.config
    assert torch.equal(again(IDS), model(IDS))
    states = minigpt.load(tmp_path, head="none")
    assert torch.equal(states(IDS), model.hidden(IDS))
    assert outline(tmp_path).head_kind == "causal-lm"
    assert all(p.is_meta for p in outline(tmp_path).parameters())


def test_it_generates_with_its_cache(model: Echo) -> None:
    ids = IDS
    for _ in range(9):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(minigpt.generate(model, IDS, 9, temperature=0), ids)
    assert len(set(ids[0, 8:].tolist())) > 1
    with pytest.raises(ValueError, match="exceed the 24 positions"):
        minigpt.generate(model, IDS, 17)


def test_it_trains(model: Echo) -> None:
    batch = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
    rows = train(model, language_model_loss, lambda i: batch, TrainConfig(40, lr=0.1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


@pytest.mark.parametrize(
    ("change", "head", "reason"),
    [
        ({}, "causal", r"head 'causal': Echo has causal-lm, none .*mean 'causal-lm'"),
        ({}, "classification", "head 'classification': Echo has"),
        ({"flavour": "sweet"}, None, r"config\.json: flavour 'sweet' is not supported.*'plain'"),
        ({"half": "two"}, None, r"config\.json: unsupported operand"),
        ({"model_type": "ech"}, None, "'ech' is unknown.*did you mean 'echo'"),
    ],
)
def test_what_it_lacks_is_refused(
    change: dict[str, Any], head: str | None, reason: str, model: Echo, tmp_path: Path
) -> None:
    minigpt.save(model, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for use in (minigpt.load, outline):
        with pytest.raises(ValueError, match=reason):
            use(tmp_path, head=head)


def test_the_most_labels_are_taken_and_one_more_is_refused() -> None:
    from minigpt.models.bert import ARCHITECTURE

    config = minigpt.BertConfig(
        vocab_size=9, hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2
    )
    most = ARCHITECTURE.outline(config, "classification", 2**20)
    assert most.head.classifier.out_features == 2**20
    for labels in (0, 2**20 + 1):
        with pytest.raises(ValueError, match="must be 1 to 1,048,576"):
            ARCHITECTURE.outline(config, "classification", labels)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_has_two_classes_unless_it_is_told(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    small = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = architecture.config_from({**small, "vocab_size": 9, "intermediate_size": 2})
    for model in (
        architecture.model(config, "classification"),
        architecture.build(config, "classification"),
        architecture.outline(config, "classification"),
    ):
        shapes = [tuple(p.shape) for n, p in model.named_parameters() if n.startswith("head.")]
        assert (2, 2) in shapes
        assert shapes[-1] == (2,)
        assert model.num_labels == 2


TASKS = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}  # HF PEFT has none for masked-lm


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_peft_is_told_what_a_head_is_for(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    config = architecture.config_from(
        {"model_type": kind, "num_layers": 1, "n_layer": 1, "num_hidden_layers": 1}
    )
    for head in architecture.heads:
        task = architecture.outline(config, head).task_type
        assert task == TASKS.get(head, "FEATURE_EXTRACTION")
        assert task in list(peft.TaskType)
