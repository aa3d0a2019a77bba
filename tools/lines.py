"""Keeps the line numbers of the documentation true.

In the tables "term | code | where" of `docs/methods/*.md` a row names a piece of code and the line
on which it stands:

    | s | `self.scaling = alpha / r` | [peft_lite/lora.py:102](../../peft_lite/lora.py#L102) |

    python -m tools.lines           rewrites the numbers
    python -m tools.lines --check   exits with 1 when one is wrong
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = "| term | code | where |"
ROW = re.compile(r"(\|[^|]+\| `([^`|]+)` \| )\[([^]:]+):\d+\]\(\.\./\.\./([^)#]+)#L\d+\) \|")


def pages() -> list[Path]:
    """The pages with such tables, in order."""
    return sorted((ROOT / "docs" / "methods").glob("*.md"))


def line_of(code: str, path: Path) -> int:
    """The number of the one line that is the code, or else of the one that holds it.

    Raises:
        ValueError: there is no such file, or the code stands in it nowhere or more than once.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    lines = path.read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip() == code]
    if not numbers:
        numbers = [number for number, line in enumerate(lines, 1) for _ in range(line.count(code))]
    if len(numbers) != 1:
        raise ValueError(f"{code!r} stands {len(numbers)} times in {path}, must stand there once")
    return numbers[0]


def corrected(text: str) -> str:
    """The page with the numbers that the code has now.

    Raises:
        ValueError: a row that is not of this form, or whose code is not to be found.
    """
    lines, within = [], False
    for line in text.splitlines():
        within = line == HEADER or (within and line.startswith("|"))
        if within and line != HEADER and not line.startswith("| ---"):
            line = _corrected_row(line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _corrected_row(row: str) -> str:
    match = ROW.fullmatch(row)
    if match is None or match[3] != match[4]:
        raise ValueError(f"{row!r} must be | term | `code` | [path:1](../../path#L1) |")
    beginning, code, path = match[1], match[2], match[3]
    number = line_of(code, ROOT / path)
    return f"{beginning}[{path}:{number}](../../{path}#L{number}) |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.lines", description="line numbers")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is wrong")
    check = parser.parse_args(arguments).check
    wrong = []
    for page in pages():
        before = page.read_text()
        try:
            after = corrected(before)
        except ValueError as error:
            raise ValueError(f"{page.name}: {error}") from None
        if after != before:
            wrong.append(page)
            if not check:
                page.write_text(after)
    for page in wrong:
        print(f"{page.name}: {'wrong lines' if check else 'rewritten'}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
