"""Our `kernels` beside the libraries that may look for Hugging Face's, which has the same name.

transformers finds our module and asks for the version of the distribution that brings it: outside
the versions that it can use, it says that there is none.  bitsandbytes tries to import one function
and goes on without.  peft does not ask.
"""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
THEIRS = ("0.18.2", "0.19")  # from, below: what transformers takes for Hugging Face's

BEFORE = """
import sys
sys.path.insert(0, {root!r})
import kernels
assert kernels.ClippedAdamW.__module__ == "kernels.optimizers", kernels.__file__
"""
TRANSFORMERS = """
import torch, transformers
from transformers.utils import is_kernels_available
assert is_kernels_available() is False
config = transformers.GPTNeoConfig(
    vocab_size=31, hidden_size=12, num_layers=2, num_heads=3, max_position_embeddings=16,
    attention_types=[[["global", "local"], 1]], window_size=4,
    bos_token_id=None, eos_token_id=None,
)
model = transformers.GPTNeoForCausalLM(config)
ids = torch.arange(20).view(2, 10)
def trains(model, name):
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if name in n]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)
"""
RUNS = {
    "transformers": TRANSFORMERS + 'trains(model, "")',
    "peft": TRANSFORMERS
    + """
import peft
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
trains(model, "lora_")
""",
    "bitsandbytes": """
import bitsandbytes.functional as bnb, torch
w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
packed, state = bnb.quantize_nf4(w, blocksize=64)
back = bnb.dequantize_nf4(packed, state)
assert packed.numel() == w.numel() // 2 and 0 < (back - w).abs().max() < 0.2 * w.abs().max()
""",
}
AFTER = """
import kernels as again
assert sys.modules["kernels"] is kernels is again
"""


@pytest.mark.parametrize("library", RUNS)
def test_a_library_imports_and_runs_after_our_kernels(library: str) -> None:
    program = BEFORE.format(root=str(ROOT)) + RUNS[library] + AFTER
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr


def test_no_version_of_ours_looks_like_theirs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for found in (project["version"], version(project["name"])):
        assert not Version(THEIRS[0]) <= Version(found) < Version(THEIRS[1])
    assert project["name"] in packages_distributions()["kernels"]
