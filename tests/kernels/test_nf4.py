"""The 4-bit codec against bitsandbytes, scipy and closed forms; the product against dense ones."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import linear

from minigpt_kernels import nf4
from minigpt_kernels.nf4 import CODES, SCALE_CODES, Quantized, dequantize, quantize, scales_of
from minigpt_kernels.nf4_linear import nf4_linear
from tests.conftest import real_data

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((64, 64), (48, 576), (3, 7), (5, 64), (33, 65), (31, 33), (200, 300), (1, 129))


@pytest.fixture(scope="module")
def bnb() -> Any:
    """bitsandbytes; its CPU code compiles itself for each shape otherwise."""
    torch.compiler.set_stance("force_eager")
    yield pytest.importorskip("bitsandbytes.functional")
    torch.compiler.set_stance("default")


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.05
    w[-1] *= 30  # an outlier
    return w.to(dtype)


def theirs(bnb: Any, w: Tensor, double: bool, block: int = 64) -> tuple[Quantized, Tensor]:
    """bitsandbytes' state, as ours, and what it dequantises to."""
    packed, state = bnb.quantize_4bit(
        w, blocksize=block, compress_statistics=double, quant_type="nf4"
    )
    nested = (state.state2.absmax, state.offset) if double else (None, None)
    it = Quantized(packed.view(-1), state.absmax, *nested, w.shape, w.dtype, block)
    return it, bnb.dequantize_4bit(packed, state)


def test_the_codes_are_quantiles_of_the_normal_distribution() -> None:
    p = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [norm.ppf(p + i * (0.5 - p) / 8) for i in range(8)]
    negative = [-norm.ppf(p + i * (0.5 - p) / 7) for i in range(7)]
    want = sorted([x / positive[0] for x in [*positive, *negative, 0.0]])
    assert torch.allclose(torch.tensor(CODES), torch.tensor(want, dtype=torch.float32), atol=2e-7)
    assert len(set(CODES)) == 16


def test_the_codes_of_scales_are_those_of_bitsandbytes(bnb: Any) -> None:
    assert torch.equal(torch.tensor(SCALE_CODES), bnb.create_dynamic_map(signed=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_codes_and_numbers_are_those_of_bitsandbytes(
    bnb: Any, shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> None:
    w = weight(shape, dtype)
    w.view(-1)[:64] = 0  # a block of zeros
    it, dense = theirs(bnb, w, double)
    ours = quantize(w, double=double)
    assert torch.equal(ours.packed, it.packed)
    assert torch.equal(dequantize(it), dense)
    if not double:
        assert torch.allclose(ours.scales, it.scales, rtol=0, atol=1e-37)  # 0, or 1e-38, of zeros
        assert torch.equal(dequantize(ours), dense)


@pytest.mark.parametrize("block", nf4.BLOCKS)
def test_other_blocks(bnb: Any, block: int) -> None:
    w = weight((17, 513))  # bitsandbytes is wrong at blocks of 1024 in rows of 512
    it, dense = theirs(bnb, w, False, block)
    ours = quantize(w, block, double=False)
    assert torch.equal(ours.packed, it.packed)
    assert torch.equal(dequantize(ours), dense)


def test_the_codes_of_scales_are_the_nearest_and_few_of_bitsandbytes_differ(bnb: Any) -> None:
    w = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1))
    ours, (it, _) = quantize(w), theirs(bnb, w, True)
    assert ours.offset is not None
    assert ours.scales_of_scales is not None
    plain = quantize(w, double=False).scales
    scaled = (plain - ours.offset).view(-1, 256) / ours.scales_of_scales[:, None]
    table = torch.tensor(SCALE_CODES)
    codes = ours.scales.int()
    error, below, above = (
        (table[(codes + d).clamp(0, 255)].view_as(scaled) - scaled).abs() for d in (0, -1, 1)
    )
    near = torch.minimum(below, above)
    assert (error <= near + 1e-6).all()
    assert 0 < (ours.scales != it.scales).sum() < 500  # of 262,144


@pytest.mark.parametrize("double", [False, True])
def test_the_error_is_bounded_by_the_widest_gap(double: bool) -> None:
    w = weight((33, 65))
    it = quantize(w, double=double)
    gap = max(b - a for a, b in pairwise(CODES))
    a = quantize(w, double=False).scales.repeat_interleave(64)[: w.numel()].view_as(w)
    slack = (scales_of(it) - quantize(w, double=False).scales).abs().max()
    assert ((dequantize(it) - w).abs() <= a * gap / 2 + slack + 1e-6).all()


def test_every_number_gets_the_nearest_code() -> None:
    w = weight((16, 64))
    it = quantize(w, double=False)
    table = it.scales[:, None, None] * torch.tensor(CODES)
    best = (w.view(-1, 64, 1) - table).abs().amin(2)
    assert torch.allclose((dequantize(it) - w).abs().view(-1, 64), best, atol=1e-7)


def test_bits_of_a_weight() -> None:
    it = quantize(torch.randn(4096, 1024))
    assert 8 * it.nbytes / it.shape.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    plain = quantize(torch.randn(4096, 1024), double=False)
    assert 8 * plain.nbytes / plain.shape.numel() == 4.5


def test_golden_values() -> None:
    content, meta = (
        load_file(real_data("nf4", "golden.safetensors")),
        json.loads(real_data("nf4", "meta.json").read_text()),
    )
    seen = 0
    for name, about in meta.items():
        if about["quant_type"] != "nf4":
            continue
        state = about["quant_state"]
        part = {key: content[f"{name}.{key}"] for key in about["keys"]}
        offset = state.get("nested_offset")
        it = Quantized(
            part["weight"].view(-1),
            part["weight.absmax"],
            part.get("weight.nested_absmax"),
            None if offset is None else torch.tensor(offset),
            torch.Size(state["shape"]),
            getattr(torch, state["dtype"]),
            state["blocksize"],
        )
        assert torch.equal(dequantize(it), content[f"{name}.expected.dequantized"])
        w = content[f"{name}.input.weight"]
        assert torch.equal(quantize(w, double=offset is not None).packed, it.packed)
        seen += 1
    assert seen == 4


def test_the_mean_error_is_the_published_one() -> None:
    published = json.loads(real_data("nf4", "bnb_test_errors.json").read_text())
    for block, (mean, deviation) in zip(
        published["blocksizes"], published["nf4"]["abs"], strict=True
    ):
        w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(block))
        error = (dequantize(quantize(w, block, double=False)) - w).abs().mean().item()
        assert abs(error - mean) < 7 * deviation


def test_what_cannot_be_quantised_is_refused() -> None:
    for value in (float("nan"), float("inf")):
        w = torch.randn(5, 70)
        w[4, 69] = value
        with pytest.raises(ValueError, match="NaN or an infinite"):
            quantize(w)
    for block in (0, 63, 8192):
        with pytest.raises(ValueError, match=f"block is {block}, must be one of 32, 64"):
            quantize(torch.randn(64, 64), block)
    with pytest.raises(ValueError, match=r"float64, must be one of torch\.float32"):
        quantize(torch.randn(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no number"):
        quantize(torch.randn(0, 4))


@pytest.mark.parametrize("shape", [(100, 65), (128, 128), (3, 7), (300, 96)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 2**12, 2**20])
def test_the_product_is_that_of_the_dense_weight(
    shape: tuple[int, int], dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt_kernels.nf4_linear.TILE", tile)
    it = quantize(weight(shape))
    dense = dequantize(it, torch.float32).to(dtype)
    x = torch.randn(2, 5, shape[1]).to(dtype).requires_grad_()
    b = torch.randn(shape[0]).to(dtype).requires_grad_()
    y, want = nf4_linear(x, it, b), linear(x, dense, b)
    dy = torch.randn_like(y)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * want.abs().max().item()}
    assert y.dtype == dtype
    assert torch.allclose(y, want, **tolerance)
    for ours, other in zip(
        torch.autograd.grad(y, (x, b), dy), torch.autograd.grad(want, (x, b), dy), strict=True
    ):
        assert torch.allclose(
            ours, other, rtol=0, atol=8 * torch.finfo(dtype).eps * other.abs().max().item()
        )


def test_first_and_second_derivatives() -> None:
    it = quantize(torch.randn(70, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, it, b), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: nf4_linear(x, it, b) ** 2, (x, b))


def test_autocast_computes_in_its_dtype() -> None:
    it = quantize(torch.randn(64, 64))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, it)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x.bfloat16() @ dequantize(it, torch.bfloat16).T)


def test_a_state_of_bitsandbytes_with_double_quantization_is_kept(bnb: Any) -> None:
    it, dense = theirs(bnb, weight((200, 300)), True)
    assert torch.equal(dequantize(replace(it, dtype=torch.float32)), dense)


def test_the_default_device_changes_nothing() -> None:
    it = quantize(weight((64, 64)))
    want = dequantize(it)
    nf4._quads.cache_clear()
    with torch.device("meta"):
        got = dequantize(it)
    assert torch.equal(got, want)
