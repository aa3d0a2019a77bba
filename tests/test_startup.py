"""What a fresh interpreter loads: the default path brings in none of the libraries that take
seconds to import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch._dynamo", "triton", "matplotlib", "jinja2", "scipy", "transformers")
STEPS = {
    "import torch": "import torch",
    "import minigpt": "import minigpt",
    "import peft_lite": "import peft_lite",
    "import minigpt_kernels": "import minigpt_kernels",
    "load a decoder": 'neo = minigpt.load("bundled")',
    "load an encoder": 'bert = minigpt.load("bundled-bert")',
    "forward": "ids = torch.arange(16)[None]; neo(ids); bert(ids)",
    "attach": 'peft_lite.attach(neo, peft_lite.LoraConfig(target_modules=["query", "value"]))',
    "forward, LoRA": "out = neo.train()(ids)",
    "backward": "out.logsumexp(-1).mean().backward()",
    "optimizer": "optimizer = minigpt_kernels.ClippedAdamW("
    "[p for p in neo.parameters() if p.requires_grad])",
    "step": "optimizer.step(); optimizer.zero_grad()",
    "load its state": "optimizer.load_state_dict(optimizer.state_dict())",
    "generate": "minigpt.generate(neo.eval(), ids, max_new_tokens=2)",
}
PROGRAM = f"""
import json, sys
for name, code in {STEPS}.items():
    exec(code)
    print(json.dumps([name, [m for m in {HEAVY} if m in sys.modules]]))
"""


def test_no_step_of_the_default_path_loads_a_heavy_library() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools" / "path")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    loaded = dict(map(json.loads, done.stdout.splitlines()))
    assert loaded.keys() == STEPS.keys()
    assert loaded == {name: [] for name in STEPS}
