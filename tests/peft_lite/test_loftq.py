"""LoftQ and QPiSSA: the alternation on closed forms with a quantizer that rounds, then on models in
4 bits.
"""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt.checkpoints.directory import save
from peft_lite import DoraConfig, LoraConfig
from peft_lite.loftq import loftq
from peft_lite.starts import pissa
from tests.peft_lite.peft_methods import inputs, of, shake, trained
from tests.peft_lite.peft_models import Picture, Plain, pair, tokens


def matrix(rows: int = 9, columns: int = 13) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.manual_seed(2))


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -3 to 3, and a scale for each row."""
    scale = w.abs().amax(1, keepdim=True) / 3
    return (w / scale).round().to(torch.int8), scale


def dequantize(q: tuple[Tensor, Tensor]) -> Tensor:
    return q[0].double() * q[1]


def rounded(w: np.ndarray) -> np.ndarray:
    """What those numbers stand for."""
    scale = np.abs(w).max(1, keepdims=True) / 3
    numbers: np.ndarray = np.round(w / scale) * scale
    return numbers


def best_rank(m: np.ndarray, r: int) -> np.ndarray:
    u, sigma, vh = np.linalg.svd(m)
    best: np.ndarray = u[:, :r] @ np.diag(sigma[:r]) @ vh[:r]
    return best


def error(W: Tensor, s: float, Q: tuple[Tensor, Tensor], A: Tensor, B: Tensor) -> float:
    return float(np.linalg.norm((W - dequantize(Q) - s * B @ A).numpy()))


@pytest.mark.parametrize("s", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(9, 13), (13, 9)])
def test_one_iteration_approximates_what_rounding_lost(shape: tuple[int, int], s: float) -> None:
    W = matrix(*shape)
    Q, A, B = loftq(W, 3, s, 1, quantize, dequantize)
    q = rounded(W.numpy())
    np.testing.assert_allclose(dequantize(Q).numpy(), q, atol=1e-12)
    np.testing.assert_allclose(s * (B @ A).numpy(), best_rank(W.numpy() - q, 3), atol=1e-12)
    assert A.shape == (3, shape[1])
    assert B.shape == (shape[0], 3)


def test_each_iteration_is_the_equation_and_the_best_is_taken() -> None:
    W, s, r = matrix(), 2.5, 3
    w, ba, errors = W.numpy(), np.zeros((9, 13)), []
    for t in range(1, 7):
        q = rounded(w - ba)
        ba = best_rank(w - q, r)
        errors.append(np.linalg.norm(w - q - ba))
        got = error(W, s, *loftq(W, r, s, t, quantize, dequantize))
        np.testing.assert_allclose(got, min(errors))
    assert errors[1] < errors[0] < errors[-1]  # the second is the best, the last the worst


def test_with_all_ranks_nothing_is_lost() -> None:
    W = matrix()
    assert error(W, 2.5, *loftq(W, 9, 2.5, 1, quantize, dequantize)) < 1e-12


def test_a_quantizer_that_loses_nothing_leaves_nothing_to_start_from() -> None:
    W = matrix().round().clamp(-3, 3)
    W[:, 0] = 3
    Q, A, B = loftq(W, 3, 2.5, 3, quantize, dequantize)
    assert torch.equal(dequantize(Q), W)
    assert not A.any()
    assert not B.any()


def test_from_pissa_the_principal_part_is_not_quantized() -> None:
    W, s, r = 0.1 * matrix(), 2.5, 2
    W += 20 * torch.outer(W[:, 0], W[0])
    Q, A, B = loftq(W, r, s, 1, quantize, dequantize, pissa(W, r, s))
    w = W.numpy()
    q = rounded(w - best_rank(w, r))
    np.testing.assert_allclose(dequantize(Q).numpy(), q, atol=1e-12)
    np.testing.assert_allclose(s * (B @ A).numpy(), best_rank(w - q, r), atol=1e-12)
    assert error(W, s, Q, A, B) < error(W, s, *loftq(W, r, s, 1, quantize, dequantize))


@pytest.mark.parametrize("iterations", [0, True, 1.5])
def test_a_number_of_iterations_that_is_none_is_refused(iterations: Any) -> None:
    with pytest.raises(ValueError, match=rf"iterations is {iterations}, must be a whole number"):
        loftq(matrix(), 3, 1.0, iterations, quantize, dequantize)


def config(start: Any = "loftq", **settings: Any) -> LoraConfig:
    settings = {"target_modules": ["q_proj", "c_fc"], "r": 4, "lora_alpha": 10, **settings}
    return LoraConfig(init_lora_weights=start, **settings)


def distances(dense: nn.Module, handle: Any, name: str = "default") -> Tensor:
    """|W - deq(Q) - s B A| of each layer that the LoRA is on."""
    return torch.stack(
        [
            (dense.get_submodule(place).weight - w.layer.dense_weight() - w.delta()).norm()
            for place, w in handle.methods[name].wrappers.items()
        ]
    ).detach()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pair("gpt-neo", tmp_path_factory.mktemp("base"))[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_every_start_is_nearer_to_the_weight_than_4_bits_are(dense: Any, rslora: bool) -> None:
    plain = copy.deepcopy(dense)
    names = peft_lite.quantize(plain)
    settings = {"use_rslora": rslora, "rank_pattern": {"c_fc": 6}}
    far = distances(dense, peft_lite.attach(plain, config(True, **settings)))
    near = {}
    for start, iterations in (("loftq", 1), ("loftq", 5), ("pissa", 1), ("pissa", 5)):
        model = copy.deepcopy(dense)
        handle = peft_lite.attach_quantized(model, config(start, **settings), iterations=iterations)
        quantized = [
            n for n, m in model.named_modules() if isinstance(m, peft_lite.QuantizedLinear)
        ]
        assert [n.removesuffix(".base") for n in quantized] == names
        near[start, iterations] = distances(dense, handle)
        assert (near[start, iterations] < 0.9 * far).all()
    for start in ("loftq", "pissa"):
        assert (near[start, 5] <= near[start, 1] * (1 + 1e-6)).all()
        assert near[start, 5].sum() < near[start, 1].sum()


@pytest.mark.parametrize(("start", "low", "high"), [("loftq", 0, 0.3), ("pissa", 0.9, 1.1)])
def test_from_pissa_the_lora_holds_the_principal_part(
    dense: Any, start: str, low: float, high: float
) -> None:
    model = copy.deepcopy(dense)
    handle: Any = peft_lite.attach_quantized(model, config(start))
    for place, wrapper in handle.methods["default"].wrappers.items():
        W = dense.get_submodule(place).weight.detach().numpy()
        share = np.linalg.norm(wrapper.delta().detach()) / np.linalg.norm(best_rank(W, 4))
        assert low < share < high


@pytest.mark.parametrize("double", [True, False])
def test_after_one_iteration_the_file_fits_the_quantized_model(
    dense: Any, double: bool, tmp_path: Path
) -> None:
    model = copy.deepcopy(dense)
    handle = peft_lite.attach_quantized(model, config(), double=double)
    shake(trained(model).values())
    handle.save(tmp_path)
    other = copy.deepcopy(dense)
    peft_lite.quantize(other, double=double)
    before = of(other, tokens())
    peft_lite.load(other, tmp_path)
    assert torch.equal(of(other, tokens()), of(model, tokens()))
    handle.detach()
    assert torch.equal(of(model, tokens()), before)
    assert not torch.equal(before, of(dense, tokens()))


@pytest.mark.parametrize("start", ["loftq", "pissa"])
def test_after_more_of_them_base_and_file_are_saved_apart(
    dense: Any, start: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(dense)
    handle = peft_lite.attach_quantized(model, config(start), "mine", iterations=3)
    shake(trained(model).values())
    want = of(model, tokens())
    handle.save(tmp_path / "adapter")
    handle.detach()
    save(model, tmp_path / "base")
    again = minigpt.load(tmp_path / "base")
    peft_lite.load(again, tmp_path / "adapter")
    assert torch.equal(of(again, tokens()), want)


def test_it_is_a_lora_as_any_other() -> None:
    torch.manual_seed(4)
    model = Plain().eval()
    settings: dict[str, Any] = {"target_modules": ["inner.0", "out"], "r": 2}
    handle = peft_lite.attach_quantized(
        model, config("loftq", **settings, bias="all"), skip=["inner.2"]
    )
    x = inputs("plain")
    start = of(model, x)
    assert type(model.get_submodule("inner.2")) is nn.Linear
    assert handle.report().trainable == 2 * (7 + 12 + 5 + 3) + 12 + 5
    with handle.enabled(False):
        base = of(model, x)
    assert not torch.equal(start, base)
    shake(trained(model).values())
    changed = of(model, x)
    peft_lite.attach(model, config("pissa", **settings), "other")
    assert torch.equal(of(model, x), base)
    handle.switch("default")
    assert torch.equal(of(model, x), changed)
    handle.merge()
    torch.testing.assert_close(of(model, x), changed, rtol=0, atol=1e-5)
    handle.detach()
    assert torch.equal(of(model, x), base)


def test_in_16_bits_the_base_is_what_quantize_gives() -> None:
    models = [Plain().bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    peft_lite.attach_quantized(models[0], config(target_modules=["inner.0"], r=2)).detach()
    peft_lite.quantize(models[1])
    for a, b in zip(models[0].modules(), models[1].modules(), strict=True):
        if isinstance(a, peft_lite.QuantizedLinear):
            assert a.dense_dtype == torch.bfloat16
            assert torch.equal(a.dense_weight(), b.dense_weight())


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such start": (
        config("olora"),
        {},
        "a LoraConfig with init_lora_weights 'olora' starts from no 4 bits: must be a LoraConfig "
        "with 'loftq' or 'pissa'; or quantize, then attach",
    ),
    "a plain start": (config(True), {}, "init_lora_weights True starts from no 4 bits"),
    "dora": (DoraConfig(["out"], init_lora_weights="loftq"), {}, "a DoraConfig with"),
    "a target that stays dense": (
        config(target_modules=["inner.2", "out"], r=2),
        {"skip": ["inner.2"]},
        "inner.2 is a target, and stays dense",
    ),
    "a table": (config(target_modules=["table", "out"], r=2), {}, "table is a target, and stays"),
    "a rank too high": (config(target_modules=["out"]), {}, "out: rank r is 4, must be at most 3"),
    "a whole module": (
        config(target_modules=["out"], r=2, modules_to_save=["inner"]),
        {},
        "inner.0 trains whole, which 4 bits cannot: skip it",
    ),
    "a codec": (config(target_modules=["out"], r=2), {"codec": "nf5"}, "codec is 'nf5'"),
    "iterations": (config(target_modules=["out"], r=2), {"iterations": 0}, "iterations is 0"),
    "a name": (config(target_modules=["nothing"], r=2), {}, "'nothing'"),
}


@pytest.mark.parametrize(("chosen", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_start_is_refused_and_nothing_is_quantized(
    chosen: Any, settings: dict[str, Any], message: str
) -> None:
    model = Plain()
    model.table = nn.Embedding(7, 5)
    before = Picture(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        peft_lite.attach_quantized(model, chosen, **settings)
    assert Picture(model) == before


def test_a_failure_at_the_end_leaves_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain()
    before = Picture(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("at the end")

    monkeypatch.setattr(peft_lite.Handle, "put", fail)
    with pytest.raises(RuntimeError, match="at the end"):
        peft_lite.attach_quantized(model, config(target_modules=["out"], r=2))
    assert Picture(model) == before
