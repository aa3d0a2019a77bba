"""Rewards: functions that score completions, by the name that a command gives them.

    length:N           - |n - N| / N      n characters of the completion
    regex:PATTERN      1 where the expression occurs in the completion, else 0
    exact              1 where the completion is the row's `answer`, white space at its ends apart
    exact:FIELD        the same for another field of the row
    rouge-l:FIELD      F of ROUGE-L against a field of the row: a text, or a list of them
    model:FOLDER       the score of a reward model: the folder of a run of `--objective reward`
    module:function    a function of an importable module

A reward is  (prompts, completions, rows) -> one number for each completion:  texts, texts, and the
fields of the row that each prompt comes from.  A new one is a function here and a line in
`REWARDS`.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import peft_lite
from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import find
from minigpt.data.text import right_padded
from minigpt.data.tokenizer import MARKS, Tokenizer
from minigpt.models.mode import mode
from minigpt.settings import runs
from peft_lite.json_files import printable, short
from peft_lite.select import nearest

Row = Mapping[str, Any]
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Sequence[float]]
AT_A_TIME = 16  # texts in a batch of a reward model


def length(argument: str) -> Reward:
    """- |n - N| / N."""
    if not argument.isdecimal() or int(argument) == 0:
        raise ValueError(f"--reward length:{argument}: want a number of characters above 0")
    N = int(argument)
    # - |n - N| / N
    return lambda prompts, completions, rows: [-abs(len(text) - N) / N for text in completions]


def regex(argument: str) -> Reward:
    """Whether an expression occurs."""
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ValueError(f"--reward regex:{argument}: {error}") from None
    return lambda prompts, completions, rows: [
        float(pattern.search(text) is not None) for text in completions
    ]


def exact(argument: str) -> Reward:
    """Whether it is the answer."""
    return by_field(argument, lambda text, value: float(text.strip() == str(value).strip()))


def rouge_l(argument: str) -> Reward:
    """F of ROUGE-L."""
    from minigpt.metrics.rouge import score

    return by_field(argument, lambda text, y: score(text, y, kinds=("rougeL",))["rougeL"].f)


def by_field(field: str, compare: Callable[[str, Any], float]) -> Reward:
    """Each completion compared with a field of its row, `answer` where no other is named."""
    name = field or "answer"
    return lambda prompts, completions, rows: [
        compare(text, _field(row, name)) for text, row in zip(completions, rows, strict=True)
    ]


def trained_model(argument: str) -> Reward:
    """The score of a reward model."""
    source, adapter = _of_run(Path(argument))
    logger = logging.getLogger("minigpt")
    before, logger.disabled = logger.disabled, adapter is not None  # the adapter brings the head
    try:
        model = load(source, head="classification", num_labels=1)
    finally:
        logger.disabled = before
    if adapter is not None:
        peft_lite.load(model, adapter)
    elif model.fresh:
        raise ValueError(f"{source} is no reward model: it lacks {', '.join(sorted(model.fresh))}")
    tokenizer, limit = Tokenizer.load(source), model.max_tokens

    @torch.no_grad()
    def reward(
        prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]
    ) -> Sequence[float]:
        scores: list[float] = []
        pairs = zip(prompts, completions, strict=True)
        texts = [marked(tokenizer.encode(joined(*pair)), tokenizer, limit) for pair in pairs]
        with mode(model, training=False):
            for start in range(0, len(texts), AT_A_TIME):
                part = texts[start : start + AT_A_TIME]
                ids, real = right_padded(part, tokenizer.special.pad)
                out = model(ids, attention_mask=real)
                scores += out[:, 0].tolist()
        return scores

    return reward


def joined(prompt: str, completion: str) -> str:
    """The text that a reward model scores."""
    return f"{prompt}\n\n{completion}"


def marked(ids: Sequence[int], tokenizer: Tokenizer, length: int) -> list[int]:
    """[CLS] ids [SEP]; of more than `length` tokens the end.

    Raises:
        ValueError: there is no room for a token between the marks.
    """
    if length <= MARKS:
        raise ValueError(f"{length} tokens have no room for one between [CLS] and [SEP]")
    special = tokenizer.special
    return [special.first, *ids[-(length - MARKS) :], special.last]


REWARDS: Mapping[str, Callable[[str], Reward]] = {
    "length": length,
    "regex": regex,
    "exact": exact,
    "rouge-l": rouge_l,
    "model": trained_model,
}


def reward_of(given: str) -> Reward:
    """The reward of a name; what it returns is checked.

    Raises:
        ValueError: there is no such reward or module, or its argument makes no sense.  The reward
            itself raises ValueError where it returns another number of scores, or one that is no
            finite number.
    """
    name, _, argument = given.partition(":")
    if name in REWARDS:
        function = REWARDS[name](argument)
    elif argument:
        function = _imported(name, argument, given)
    else:
        known = ", ".join(REWARDS)
        raise ValueError(
            f"--reward is {given!r}, must be one of {known}, or module:function"
            f"{nearest(name, REWARDS)}"
        )

    def reward(
        prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]
    ) -> Sequence[float]:
        scores = list(function(prompts, completions, rows))
        if len(scores) != len(completions):
            n = len(completions)
            raise ValueError(f"the reward {given} gave {len(scores)} scores for {n} completions")
        for score, text in zip(scores, completions, strict=True):
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise ValueError(
                    f"the reward {given} is {short(str(score))} of the completion {short(text)}, "
                    "must be a finite number"
                )
        return [float(score) for score in scores]

    return reward


def reward_files(given: str) -> dict[str, list[Path]]:
    """The files of a reward model, which a run depends on."""
    name, _, argument = given.partition(":")
    if name != "model":
        return {}
    source, adapter = _of_run(Path(argument))
    folders = [source] if adapter is None else [source, adapter]
    return {
        "reward model": [file for f in folders for file in sorted(f.iterdir()) if file.is_file()]
    }


def _of_run(folder: Path) -> tuple[Path, Path | None]:
    """The model of a run of `--objective reward`, and its adapter; or a checkpoint itself."""
    if (folder / "config.json").exists():
        return folder, None
    if not (folder / "run.json").exists():
        raise ValueError(f"--reward model:{folder}: no run and no model is there")
    settings = runs.read(folder)["settings"]
    if settings.get("objective") != "reward" or not (folder / "summary.json").exists():
        raise ValueError(f"the run in {folder} is no complete run of --objective reward")
    if (folder / "model").exists():
        return folder / "model", None
    return find(settings["model"]), folder / "adapter"


def _imported(module: str, function: str, given: str) -> Reward:
    try:
        found: Any = import_module(module)
    except ImportError as error:
        near = nearest(module, REWARDS)
        raise ValueError(f"--reward {given}: {printable(str(error))}{near}") from None
    if not callable(getattr(found, function, None)):
        raise ValueError(f"--reward {given}: {module} has no function {function}")
    reward: Reward = getattr(found, function)
    return reward


def _field(row: Row, name: str) -> Any:
    if name not in row:
        names = ", ".join(row) or "none"
        raise ValueError(f"the reward reads the field {name!r}, a row has {names:.200}")
    return row[name]
