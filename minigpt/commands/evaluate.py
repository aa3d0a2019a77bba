"""`minigpt evaluate`: a model answers the prompts of rows, and its answers are scored.

    minigpt evaluate --rouge --model smollm2 --data rows.jsonl --out runs/scores

A row is a conversation (minigpt/data/conversations.py).  Its last message is the reference, what
stands before it the prompt.  Prompts are answered in batches of consecutive rows.  A batch depends
on the settings and its number alone, and its rows are written at once, so that a run that is
stopped continues after the last whole batch with what it would have written anyway.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peft_lite
from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import FORMS, find
from minigpt.commands import scores
from minigpt.commands.command import Run
from minigpt.commands.generate import Continuation, chat_template
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.conversations import Row, all_or_faults, numbered_rows, rows_file, unread
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate, left_padded
from minigpt.metrics.rouge import TOKENIZERS, score, words_by
from minigpt.models.architecture import Decoder
from minigpt.models.config import positive
from minigpt.objectives.supervised import ends_of
from minigpt.settings import runs
from minigpt.settings.checks import check_installed
from minigpt.settings.device import DeviceOption
from minigpt.settings.manifest import model_files
from minigpt.settings.options import option, with_default
from minigpt.settings.sampling import SamplingOptions
from minigpt.training.interrupt import Interrupted, stop_requested
from minigpt.training.progress import count_bar, say
from peft_lite import storage
from peft_lite.json_files import parse_object

SHOWN = "scores.txt"


@dataclass(frozen=True, kw_only=True)
class Evaluate(SamplingOptions, DeviceOption):
    """The command's settings.

    Attributes:
        day: the date that a chat template gets which asks for it; a run keeps that of its start.
    """

    model: str = option(f"a model: {FORMS}")
    data: str = option("rows of conversations, .jsonl or .json, perhaps .gz, or bundled-answers")
    rouge: bool = option("score by ROUGE", False)
    rouge_stemmer: bool = option("compare words without their English endings", False)
    rouge_tokenizer: str = option(
        "what a word is: ascii, as in published scores of English, or unicode, of every script",
        "ascii",
        choices=tuple(TOKENIZERS),
    )
    adapter: str | None = option("an adapter directory, written here or by HF PEFT", None)
    chat_template: str | None = option(
        f"{', '.join(TEMPLATES)}, or a file (default: the adapter's or the model's)", None
    )
    batch_size: int = option("rows answered side by side", 8)
    max_new_tokens: int = with_default(SamplingOptions, "max_new_tokens", 128)
    temperature: float = with_default(SamplingOptions, "temperature", 0.0)
    day: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "max_new_tokens")
        words_by(self.rouge_tokenizer, self.rouge_stemmer)
        if not self.rouge:
            raise ValueError("nothing to measure: give --rouge")


@dataclass(frozen=True)
class Question:
    """A row: the text that is continued, its ids, and the answer to compare with."""

    prompt: str
    ids: list[int]
    reference: str


def evaluate(settings: Evaluate, out: Path, resume: bool) -> dict[str, object]:
    """Writes to OUT `scores.jsonl` (a line each row), `scores.txt`, `scores.png` and
    `summary.json`; returns the summary.
    """
    check_installed("matplotlib", *(["nltk"] if settings.rouge_stemmer else []))
    device = settings.find_device()
    settings = replace(settings, day=settings.day or date.today().isoformat())
    rows = numbered_rows(settings.data)
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    template = chat_template(
        settings.chat_template,
        settings.adapter,
        directory,
        tokenizer,
        datetime.fromisoformat(settings.day or ""),
    )
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    if settings.adapter is not None:
        peft_lite.load(model, settings.adapter)
    most = model.max_tokens - settings.max_new_tokens
    if most < 1:
        raise ValueError(
            f"--max-new-tokens is {settings.max_new_tokens:,}, must leave room for a prompt in the "
            f"{model.max_tokens:,} positions of the model"
        )
    questions = read_questions(rows, template, tokenizer, most, settings.data)
    inputs = {
        "rows": [rows_file(settings.data)],
        "chat template": [template.file] if template.file else [],
        "adapter": _adapter_files(settings),
        **model_files(directory),
    }
    runs.claim(out, "evaluate", settings, inputs)

    ends = ends_of(directory, tokenizer)
    file = out / "scores.jsonl"
    lines = _restored(file, questions, settings) if resume else []
    storage.write_text(file, "".join(lines))
    starts = range(len(lines), len(questions), settings.batch_size)
    with stop_requested() as stop, count_bar("evaluate", len(questions)) as show:
        for start in starts:
            batch = questions[start : start + settings.batch_size]
            answers = _answers(model, tokenizer, batch, start, ends, settings)
            new = [
                _line(start + i, question, prediction, ended, settings)
                for i, (question, (prediction, ended)) in enumerate(
                    zip(batch, answers, strict=True)
                )
            ]
            storage.append_text(file, "".join(new))
            lines += new
            show(len(lines))
            if stop.is_set():
                raise Interrupted(f"interrupted after row {len(lines)} of {len(questions)}")

    scored = [json.loads(line) for line in lines]
    measured = scores.measure(scored, settings.seed)
    storage.write_text(out / SHOWN, scores.text(measured, len(scored)) + "\n")
    scores.draw(out / "scores.png", scored, measured)
    summary: dict[str, object] = {
        "rows": len(scored),
        "predictions_cut": sum(not row["ended"] for row in scored),
        "rouge": {
            kind: {name: asdict(estimate) for name, estimate in parts.items()}
            for kind, parts in measured.items()
        },
        "config": asdict(settings),
    }
    runs.complete(out, summary)
    return summary


def read_questions(
    rows: Sequence[Row], template: ChatTemplate, tokenizer: Tokenizer, most: int, data: str
) -> list[Question]:
    """The last message of each conversation is the reference, the others make the prompt.

    Args:
        most: tokens that a prompt may have.

    Raises:
        ValueError: the template refuses rows, or makes prompts that are empty or too long: how many
            rows, and the first of them.
    """

    def question(row: Row) -> Question:
        *before, answer = row.messages
        try:
            prompt = template.text(before, add_generation_prompt=True)
            ids = tokenizer.encode(prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if not 1 <= len(ids) <= most:
            raise ValueError(
                f"{row.where}: its prompt has {len(ids):,} tokens, "
                f"must have 1 to {most:,} beside --max-new-tokens"
            )
        return Question(prompt, ids, answer["content"])

    questions = all_or_faults(question, rows, f"{rows_file(data)}: ", "cannot be asked")
    if fields := unread(rows, rows_file(data)):
        say(fields)
    return questions


def _adapter_files(settings: Evaluate) -> list[Path]:
    if settings.adapter is None:
        return []
    return sorted(path for path in Path(settings.adapter).iterdir() if path.is_file())


def _answers(
    model: Decoder,
    tokenizer: Tokenizer,
    batch: Sequence[Question],
    start: int,
    ends: set[int],
    settings: Evaluate,
) -> Iterator[tuple[str, bool]]:
    """The text of each answer, and whether the model ended it; else --max-new-tokens did.

    Random numbers come from the seed and the batch's first row.
    """
    device = next(model.parameters()).device
    seed = int(np.random.SeedSequence([settings.seed, start]).generate_state(1)[0])
    ids, mask = left_padded([question.ids for question in batch])
    result = generate(
        model,
        ids.to(device),
        settings.max_new_tokens,
        mask.to(device),
        **settings.sampling,
        eos_token_id=sorted(ends),
        generator=torch.Generator(device).manual_seed(seed),
    )
    for question, row in zip(batch, result[:, ids.size(1) :].tolist(), strict=True):
        answer = Continuation(tokenizer, question.ids, ends)
        for token in row:
            answer.add(token)
        yield answer.take(whole=True), answer.done


def _line(i: int, question: Question, prediction: str, ended: bool, settings: Evaluate) -> str:
    """A line of scores.jsonl."""
    measured = score(
        prediction,
        question.reference,
        stemmer=settings.rouge_stemmer,
        tokenizer=settings.rouge_tokenizer,
    )
    row = {
        "row": i + 1,
        "prompt": question.prompt,
        "prediction": prediction,
        "reference": question.reference,
        "ended": ended,
        "scores": {kind: shares._asdict() for kind, shares in measured.items()},
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _restored(file: Path, questions: Sequence[Question], settings: Evaluate) -> list[str]:
    """The lines of the whole batches that a stopped run has left; a kill may have torn the last.

    Raises:
        ValueError: a line is not as it was written.
    """
    try:
        text = file.read_bytes().decode() if file.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error.reason} at byte {error.start}") from None
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    for i, line in enumerate(lines):
        question = questions[i] if i < len(questions) else None
        if question is None or not _is_written(line, i, question, settings):
            raise ValueError(
                f"{file}, line {i + 1} is damaged or was edited: bring it back, or start a new run"
            )
    torn = len(lines) % settings.batch_size if len(lines) < len(questions) else 0
    return lines[: len(lines) - torn]


def _is_written(line: str, i: int, question: Question, settings: Evaluate) -> bool:
    """Whether a line is that of its row and its prediction has these scores."""
    try:
        row: dict[str, Any] = parse_object(line, "")
        return line == _line(i, question, row["prediction"], row["ended"], settings)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


COMMAND = Run(Evaluate, evaluate, SHOWN)
