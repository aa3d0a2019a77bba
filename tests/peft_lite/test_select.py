"""Patterns -> modules, compared with what HF PEFT targets on the same model of `transformers`."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from peft_lite.select import hf_name, select_modules, select_parameters
from tests.peft_lite.peft_models import Plain, pair, twin

# PEFT's advice on the tied head, which it targets all the same
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

Patterns = str | list[str]

CASES: list[tuple[str, Patterns]] = [
    ("gpt-neo", ["q_proj", "v_proj"]),
    ("gpt-neo", ["attention.out_proj"]),
    ("gpt-neo", ["transformer.h.1.mlp.c_fc", "k_proj"]),
    ("gpt-neo", ["lm_head"]),
    ("gpt-neo", r"transformer\.h\.0\..*(q_proj|c_proj)"),
    ("gpt-neo", r".*\.(k|v)_proj"),
    ("gpt-neo", "all-linear"),
    ("gpt-neo bare", ["h.0.attn.attention.q_proj"]),
    ("gpt-neo bare", "all-linear"),
    ("bert", ["query", "value"]),
    ("bert", ["dense"]),
    ("bert", ["output.dense"]),
    ("bert", ["attention.output.dense"]),
    ("bert", ["classifier", "pooler.dense"]),
    ("bert", r"bert\.encoder\.layer\.1\..*\.(query|dense)"),
    ("bert", "all-linear"),
    ("bert masked", ["dense"]),
    ("bert masked", "all-linear"),
    ("bert bare", ["encoder.layer.1.output.dense"]),
    ("bert bare", "all-linear"),
]


def targeted_by_peft(model: Any, patterns: Patterns, kind: str) -> set[str]:
    task = {"bert": "SEQ_CLS"}.get(kind)
    config = peft.LoraConfig(target_modules=patterns, task_type=task, modules_to_save=None)
    return set(peft.LoraModel(model, config, "default").targeted_module_names)


@pytest.mark.parametrize(("kind", "patterns"), CASES)
def test_targets_are_those_of_peft(kind: str, patterns: Patterns, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    names = {hf_name(ours, name) for name in select_modules(ours, patterns)}
    assert names == targeted_by_peft(theirs, patterns, kind)
    assert names


@pytest.mark.parametrize(
    ("kind", "patterns"), [c for c in CASES if c != ("bert", "all-linear")]
)  # PEFT knows a classifier by its task, a plain model does not
def test_targets_in_a_model_of_transformers_are_those_of_peft(
    kind: str, patterns: Patterns
) -> None:
    names = set(select_modules(twin(kind), patterns))
    assert names == targeted_by_peft(twin(kind), patterns, kind)


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
@pytest.mark.parametrize(
    ("pattern", "per_block"),
    [(["query"], 1), (["attention.output"], 1), (["mlp.up", "mlp.down"], 2), (["key", "value"], 2)],
)
def test_native_names_mean_the_same_in_every_architecture(
    kind: str, pattern: list[str], per_block: int, tmp_path: Path
) -> None:
    ours, _ = pair(kind, tmp_path)
    names = select_modules(ours, pattern)
    assert len(names) == 2 * per_block
    assert all(any(n.endswith(f".{p}") for p in pattern) for n in names)


def test_output_dense_hits_both_layers_of_that_name(tmp_path: Path) -> None:
    ours, _ = pair("bert", tmp_path)
    assert set(select_modules(ours, ["output.dense"])) == {
        f"blocks.{i}.{end}" for i in (0, 1) for end in ("attention.output", "mlp.down")
    }


def test_a_list_matches_whole_parts_from_the_end() -> None:
    assert set(select_modules(Plain(), ["inner.0"])) == {"inner.0"}
    for pattern in ("ut", "inner", "nner.0", "inner.0.weight"):
        with pytest.raises(ValueError, match=f"'{pattern}' matches no Linear"):
            select_modules(Plain(), [pattern])


def test_a_string_matches_the_whole_name() -> None:
    assert set(select_modules(Plain(), r"inner\.\d")) == {"inner.0", "inner.2"}
    for pattern in ("inner", r"nner\.0", "0"):
        with pytest.raises(ValueError, match="matches no Linear"):
            select_modules(Plain(), pattern)


def test_an_entry_of_a_list_is_no_expression() -> None:
    with pytest.raises(ValueError, match="matches no Linear"):
        select_modules(Plain(), [r"inner\.\d"])


def test_all_linear_of_a_plain_model_is_every_linear_layer() -> None:
    assert set(select_modules(Plain(), "all-linear")) == {"inner.0", "inner.2", "out"}


@pytest.mark.parametrize(
    ("kind", "patterns", "wrong", "near"),
    [
        ("gpt-neo", ["query", "valeu"], "'valeu'", "'value'"),
        ("gpt-neo", ["q_prj"], "'q_prj'", "'q_proj'"),
        ("gpt-neo", ["c_atn"], "'c_atn'", "q_proj"),
        ("bert", ["q_proj"], "'q_proj'", "query"),
        ("bert", "quer", "'quer'", "'query'"),
        ("bert", ["LayerNorm"], "'LayerNorm'", "dense"),
    ],
)
def test_a_pattern_without_a_match_is_named_with_real_names(
    kind: str, patterns: Patterns, wrong: str, near: str, tmp_path: Path
) -> None:
    ours, _ = pair(kind, tmp_path)
    with pytest.raises(ValueError, match="matches no Linear") as error:
        select_modules(ours, patterns)
    assert f"target {wrong} matches no" in str(error.value)
    assert near in str(error.value)


def test_the_end_of_a_name_given_as_a_string_is_shown_as_a_list(tmp_path: Path) -> None:
    ours, _ = pair("gpt-neo", tmp_path)
    for name in ("query", "q_proj"):
        reason = re.escape(f"a string matches whole names, a list as ['{name}'] their ends")
        with pytest.raises(ValueError, match=f"target '{name}' matches no .*{reason}") as error:
            select_modules(ours, name)
        assert "did you mean" not in str(error.value)
        assert len(select_modules(ours, [name])) == len(select_modules(ours, rf".*\.{name}")) > 0


def test_all_linear_of_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="all-linear"):
        select_modules(nn.Sequential(nn.LayerNorm(3)), "all-linear")


def test_a_list_of_parameter_parts_matches_runs_of_whole_parts(tmp_path: Path) -> None:
    ours, _ = pair("gpt-neo", tmp_path)
    assert select_parameters(ours, ["blocks.1.mlp"]) == {
        f"blocks.1.mlp.{layer}.{p}" for layer in ("up", "down") for p in ("weight", "bias")
    }
    assert select_parameters(ours, ["h.1.mlp"]) == select_parameters(ours, ["blocks.1.mlp"])
    assert not any("_norm" in n for n in select_parameters(ours, ["attention"]))
    with pytest.raises(ValueError, match=r"'atten' matches no parameter.*'attention'"):
        select_parameters(ours, ["atten"])


def test_a_string_is_searched_in_parameter_names(tmp_path: Path) -> None:
    ours, _ = pair("gpt-neo", tmp_path)
    biases = select_parameters(ours, r"\.bias$")
    assert biases == {n for n, _ in ours.named_parameters() if n.endswith(".bias")}


def test_a_tied_parameter_is_chosen_under_both_names(tmp_path: Path) -> None:
    ours, _ = pair("gpt-neo", tmp_path)
    for pattern in ("head", "lm_head", "wte", "embeddings.token"):
        assert select_parameters(ours, [pattern]) == {"head.weight", "embeddings.token.weight"}


@pytest.mark.parametrize("kind", ["gpt-neo", "gpt-neo bare", "bert", "bert masked", "bert bare"])
def test_names_translate_to_real_ones_and_back(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    real = dict(theirs.named_modules())
    linear = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear)]
    assert linear
    for name in linear:
        assert isinstance(real[hf_name(ours, name)], nn.Linear)
        assert ours.names.from_hf(hf_name(ours, name)) == name
