"""The `minigpt` command: finetune, generate, pretrain, info, study."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

import peft_lite
from minigpt import studies
from minigpt.checkpoints.directory import load, outline
from minigpt.checkpoints.source import find
from minigpt.commands.finetune import Finetune, finetune
from minigpt.commands.pretrain import Pretrain, pretrain
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models.architecture import without_values
from minigpt.settings import methods, runs
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import add_options, option
from minigpt.training.train import Interrupted


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Settings of `minigpt generate`."""

    model: str = option('a model directory, a hub id, or "bundled"')
    prompt: str = option("what the text begins with")
    adapter: str | None = option("an adapter directory, written here or by HF PEFT", None)
    max_new_tokens: int = option("tokens to add", 100)
    temperature: float = option("0: always the most likely token", 0.8)
    top_k: int | None = option("only the k most likely tokens", None)
    top_p: float | None = option("only the most likely tokens that hold probability p", None)
    seed: int = option("of the sampling", 0)


@dataclass(frozen=True, kw_only=True)
class Info(MethodOptions):
    """Settings of `minigpt info`."""

    model: str = option('a model directory, a hub id, "bundled" or "bundled-bert"')
    method: str = option("what trains", "full", choices=methods.NAMES)


def generate_text(settings: Generate) -> None:
    """Prints the prompt and its continuation."""
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"--seed is {settings.seed}, must lie in [0, 2^63)")
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    if settings.adapter is not None:
        peft_lite.load(model, settings.adapter)
    ids = tokenizer.encode(settings.prompt)
    if not ids:
        raise ValueError("--prompt is empty, must hold at least one token")
    out = generate(
        model,
        torch.tensor([ids], device=device),
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_token_id=tokenizer.end_of_text,
        generator=torch.Generator(device).manual_seed(settings.seed),
    )
    print(tokenizer.decode(out[0].tolist()))


def info(settings: Info) -> None:
    """Prints the parameter table of a model under a method; no weight is read."""
    model = outline(settings.model)
    with without_values():
        methods.attach(model, settings)
    print(peft_lite.report(model))


class Parser(argparse.ArgumentParser):
    """Complains in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"minigpt: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


RUNS: dict[str, tuple[type, Callable[[Any, Path, bool], dict[str, object]]]] = {
    "finetune": (Finetune, finetune),
    "pretrain": (Pretrain, pretrain),
}
QUERIES: dict[str, tuple[type, Callable[[Any], None]]] = {
    "generate": (Generate, generate_text),
    "info": (Info, info),
}


def parser() -> Parser:
    whole = Parser(prog="minigpt", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "finetune": "fine-tune a pretrained GPT-Neo on a text",
        "generate": "continue a prompt",
        "pretrain": "train a tokenizer and a GPT-Neo or a Bert from texts",
        "info": "table of parameters for a model and a method",
    }
    for name, text in about.items():
        one = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_options(one, (RUNS[name] if name in RUNS else QUERIES[name])[0])
        if name in RUNS:
            _add_folder(one)
    _add_studies(commands.add_parser("study", help="rerun a published experiment"))
    return whole


def _add_studies(one: argparse.ArgumentParser) -> None:
    one.description = "rerun a published experiment and put its claims to the test"
    one.add_argument("--list", action="store_true", help="name the studies")
    names = one.add_subparsers(dest="name", metavar="NAME")
    for name, text in studies.STUDIES.items():
        own = names.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_options(own, studies.study(name).Settings)
        own.add_argument(
            "--published", action="store_true", default=False, help="the write-up's settings"
        )
        _add_folder(own)


def _add_folder(one: argparse.ArgumentParser) -> None:
    one.add_argument("--out", type=Path, required=True, help="folder of the run")
    one.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in --out"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(format="minigpt: %(message)s")
    whole = parser()
    given: dict[str, Any] = vars(whole.parse_args(arguments))
    command = given.pop("command")
    try:
        if command == "study" and (given.pop("list") or given["name"] is None):
            _list_studies()
        elif command in RUNS or command == "study":
            out, resume = given.pop("out"), given.pop("resume")
            if command == "study":
                name = given.pop("name")
                command, (kind, run) = f"study {name}", studies.command(name)
                if given.pop("published"):
                    given = studies.published(name, given)
            else:
                kind, run = RUNS[command]
            settings: Any = runs.settle(kind, command, given, out, resume)
            summary = runs.summary(out)
            if summary is not None:
                print(f"minigpt: the run in {out} is complete", file=sys.stderr)
            _print_summary(summary or run(settings, out, resume), out)
        else:
            kind, query = QUERIES[command]
            query(runs.fill(kind, given))
    except Interrupted as stop:
        print(
            f"minigpt: {stop}; continue with: minigpt {command} --resume --out {out}",
            file=sys.stderr,
        )
        return 130
    except KeyboardInterrupt:
        print("minigpt: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        whole.error(str(error))
    return 0


def _list_studies() -> None:
    for name, text in studies.STUDIES.items():
        print(f"{name:24} {text}")


def _print_summary(summary: dict[str, object], out: Path) -> None:
    for name, value in summary.items():
        if name != "config":
            print(
                f"{name:26} {value:,}" if isinstance(value, int | float) else f"{name:26} {value}"
            )
    sample = out / "sample.txt"
    if sample.exists():
        print(sample.read_text())
    print(f"in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
