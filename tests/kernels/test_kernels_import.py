"""The folder `kernels/` is imported as `minigpt_kernels`, since Hugging Face has a distribution
whose module is `kernels`.
"""

import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

import minigpt_kernels

ROOT = Path(__file__).parents[2]

BEFORE = """
import sys
import minigpt_kernels
assert minigpt_kernels.ClippedAdamW.__module__.startswith("minigpt_kernels.")
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
assert not hasattr(sys.modules.get("kernels"), "lora_linear")
"""


@pytest.mark.parametrize("library", RUNS)
def test_a_library_imports_and_runs_after_our_kernels(library: str) -> None:
    program = BEFORE + RUNS[library] + AFTER
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr


def test_the_module_is_our_folder() -> None:
    assert Path(minigpt_kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_our_distribution_brings_no_module_called_kernels() -> None:
    assert "minigpt" not in packages_distributions().get("kernels", [])
    assert distribution("minigpt").name == "minigpt"


HIDDEN = """
import sys
sys.path.insert(0, project)
import minigpt_kernels, kernels
assert not hasattr(kernels, "lora_linear")
assert not [name for name in sys.modules if name.startswith("kernels.lora")]
"""
# what Hugging Face's package looks like: a module with a submodule
STRANGER = {
    "__init__.py": "from .hub import get_kernel\n",
    "hub.py": "def get_kernel(): return 5\n",
}


@pytest.mark.parametrize("program", ["", TRANSFORMERS], ids=["alone", "transformers"])
def test_the_folder_on_the_path_is_no_second_copy(program: str, tmp_path: Path) -> None:
    """In a checkout `import kernels` finds this folder: transformers asks, and gets nothing."""
    program = f"project = {str(ROOT)!r}\n{HIDDEN}{program}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_folder_on_the_path_hides_no_other_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    for name, code in STRANGER.items():
        (tmp_path / "kernels" / name).write_text(code)
    program = f"""
project = {str(ROOT)!r}
{HIDDEN}
import kernels.hub
assert kernels.get_kernel() == kernels.hub.get_kernel() == 5
assert kernels.__file__ == {str(tmp_path / "kernels" / "__init__.py")!r}
"""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path.append({str(tmp_path)!r})\n{program}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
