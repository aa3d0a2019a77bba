"""Every number of every config: its default is that of transformers, and where its range ends."""

from dataclasses import fields
from math import nextafter
from typing import Any, get_args

import pytest
import transformers

import minigpt
from minigpt.models.architectures import ARCHITECTURES

MOST = 2**24
SIZE, LAYERS = (1, MOST, [0, -1, MOST + 1]), (1, 1000, [0, 1001])
PROBABILITY = (0.0, nextafter(1, 0), [-1e-9, 1.0])
EPSILON = (0.0, 1.0, [-1e-9, nextafter(1, 2)])
SPREAD = (0.0, 100.0, [-1e-9, nextafter(100, 101)])
COMMON = {"vocab_size": SIZE, "initializer_range": SPREAD}
BERT = {
    **COMMON,
    **dict.fromkeys(("max_position_embeddings", "type_vocab_size", "hidden_size"), SIZE),
    **dict.fromkeys(("num_attention_heads", "intermediate_size"), SIZE),
    **{"num_hidden_layers": LAYERS, "layer_norm_eps": EPSILON},
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), PROBABILITY),
    "classifier_dropout": PROBABILITY,
}
RANGES: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {
        **COMMON,
        **dict.fromkeys(("max_position_embeddings", "hidden_size", "num_heads"), SIZE),
        **dict.fromkeys(("intermediate_size", "window_size"), SIZE),
        **{"num_layers": LAYERS, "layer_norm_epsilon": EPSILON},
        **dict.fromkeys(("embed_dropout", "attention_dropout", "resid_dropout"), PROBABILITY),
    },
    "GPT2Config": {
        **COMMON,
        **dict.fromkeys(("n_positions", "n_embd", "n_head", "n_inner"), SIZE),
        **{"n_layer": LAYERS, "layer_norm_epsilon": EPSILON},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), PROBABILITY),
    },
    "BertConfig": BERT,
    "RobertaConfig": BERT,
    "LlamaConfig": {
        **COMMON,
        **dict.fromkeys(("max_position_embeddings", "hidden_size", "intermediate_size"), SIZE),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "sliding_window"), SIZE),
        **{"num_hidden_layers": LAYERS, "rms_norm_eps": EPSILON, "head_dim": SIZE},
        "attention_dropout": PROBABILITY,
    },
}
IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
CALLED = {"n_inner": "inner", "num_key_value_heads": "kv_heads", "head_dim": "head_width"}


def beside(name: str, field: str, value: Any) -> dict[str, Any]:
    """The number, with others with which it makes sense if it does by itself."""
    given: dict[str, Any] = {field: value}
    possible = min(max(1, int(value)), MOST)
    match name:
        case "GPTNeoConfig":
            given = {
                "hidden_size": possible if field == "num_heads" else 12,
                "num_heads": 1,
            } | given
        case "GPT2Config":
            given = {"n_embd": possible if field == "n_head" else 12, "n_head": 1} | given
            given = {"n_inner": 1} | given
        case "LlamaConfig":
            heads = possible if field == "num_key_value_heads" else 1
            given = {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 2} | given
            given |= {"model_type": "mistral"} if field == "sliding_window" else {}
        case _:
            hidden = possible if field == "num_attention_heads" else 12
            given = {"hidden_size": hidden, "num_attention_heads": 1} | given
            given |= {"pad_token_id": 0} if name == "RobertaConfig" else {}
    return given


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, ranges in RANGES.items() for f in ranges]
)
def test_a_number_is_taken_to_the_ends_of_its_range_and_no_further(name: str, field: str) -> None:
    config = getattr(minigpt, name)
    low, high, outside = RANGES[name][field]
    if (name, field) in (("RobertaConfig", "max_position_embeddings"), ("LlamaConfig", "head_dim")):
        low = 2  # a position for padding and one more; rotary pairs
    for value in (low, high):
        assert getattr(config(**beside(name, field, value)), field) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"{CALLED.get(field, field)} is {value}, must lie in"):
            config(**beside(name, field, value))


@pytest.mark.parametrize("name", RANGES)
def test_every_number_has_its_range(name: str) -> None:
    kinds = {f.name: {f.type, *get_args(f.type)} for f in fields(getattr(minigpt, name))}
    numbers = {n for n, kind in kinds.items() if kind & {int, float}}
    assert numbers - IDS - {"rope_theta"} == RANGES[name].keys()


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "bert", "roberta"])
def test_absent_fields_are_those_of_transformers(kind: str) -> None:
    ours = ARCHITECTURES[kind].config_from({})
    theirs = transformers.AutoConfig.for_model(kind)
    for field in fields(ours):
        value = getattr(ours, field.name)
        if field.name not in ("attention_layers", "id2label"):  # None, which stands for a list
            assert value == getattr(theirs, field.name), field.name


def test_a_name_of_another_type_is_refused_as_a_wrong_name() -> None:
    with pytest.raises(ValueError, match="model_type is 50, must be one of llama"):
        minigpt.LlamaConfig(50)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head 3: GPTNeo has causal-lm"):
        ARCHITECTURES["gpt_neo"].build(minigpt.GPTNeoConfig(), 3)  # type: ignore[arg-type]
