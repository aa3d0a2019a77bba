"""What a model begins with: weights drawn with the config's spread, biases 0, norms 1."""

import pytest
import torch

import minigpt

SPREAD = 0.3
SMALL = {"vocab_size": 90, "hidden_size": 32, "initializer_range": SPREAD}
DECODER = {**SMALL, "max_position_embeddings": 40, "num_layers": 2, "num_heads": 2}
ENCODER = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GPT2 = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": SPREAD}
LLAMA = {**ENCODER, "attention_bias": True, "mlp_bias": True}
MODELS = {
    "GPT-2": lambda: minigpt.GPT2(minigpt.GPT2Config(**GPT2)),
    "Llama": lambda: minigpt.Llama(minigpt.LlamaConfig(**LLAMA)),
    "GPT-Neo": lambda: minigpt.GPTNeo(minigpt.GPTNeoConfig(**DECODER)),
    "BERT": lambda: minigpt.Bert(minigpt.BertConfig(**ENCODER), "masked-lm"),
    "RoBERTa": lambda: minigpt.Roberta(minigpt.RobertaConfig(**ENCODER), "masked-lm"),
    "BERT, classes": lambda: minigpt.Bert(minigpt.BertConfig(**ENCODER), "classification", 40),
}


@pytest.mark.parametrize("kind", MODELS)
def test_first_values(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__}
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif name.rpartition(".")[0] in norms:
            assert (p == 1).all(), name
        else:
            spread = SPREAD
            if name == "head.classifier.weight":  # Xavier's: uniform in +- (6 / (in + out))^(1/2)
                bound = (6 / (32 + 40)) ** 0.5
                assert 0.95 * bound < p.abs().max() <= bound
                spread = bound / 3**0.5
            # five standard errors of the mean and of the deviation
            assert p.mean().abs() < 5 * spread / p.numel() ** 0.5, name
            assert p.std().item() == pytest.approx(spread, rel=5 / (2 * p.numel()) ** 0.5), name
