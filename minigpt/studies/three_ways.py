"""Write-up 004: a model is fine-tuned in three ways, and ROUGE judges what it writes.

    self-supervised   it predicts every token of the rows, prompts among them
    supervised        it predicts the tokens of the answers alone
    reinforcement     from the supervised model on it draws answers of its own, and GRPO prefers
                      those whose ROUGE-L against the row's answer is above their group's mean

The rows are conversations.  The first two ways start from the given model and see as many batches
of the same rows; each way trains a LoRA of its own on every linear layer.  All are judged on the
same rows held out: ROUGE of the most likely answers; and of answers that are drawn as the reward
sees them, at temperature 1, their ROUGE-L (the reward), their length, and the divergence from the
model that the way started from.

The write-up is a survey without an experiment, so its claims quote no figures.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoints.source import find
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.conversations import Row, numbered_rows, rows_file, split_rows
from minigpt.data.packing import Example, Grouping, ShuffledRows
from minigpt.data.preferences import Encoder
from minigpt.generation import generate, left_padded
from minigpt.metrics.intervals import Estimate
from minigpt.metrics.rouge import score
from minigpt.models.config import positive
from minigpt.models.mode import mode
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options
from minigpt.objectives.rewards import rouge_l
from minigpt.objectives.supervised import before_end, ends_of, example
from minigpt.settings import methods
from minigpt.settings.checks import check_heldout
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, above
from minigpt.studies.decoders import DECODER, Decoder, load_decoder
from minigpt.studies.figures import FROZEN, FULL, OTHERS, Figures, bar
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences, over_seeds
from minigpt.studies.report import Report, Table
from minigpt.studies.training import at_least, learn
from minigpt.studies.words import moves, ran_on, shown
from minigpt.training.rounds import Prompt, Rounds, Sampler
from minigpt.training.train import TrainConfig
from peft_lite.handle import Handle

TITLE = "Three ways to fine-tune (write-up 004)"
SOURCES: Mapping[str, str] = {}  # the write-up names no model
PUBLISHED = {"steps": 300}  # of 002, since 004 names no number
START, SELF, SUPERVISED, REINFORCED = "start", "self-supervised", "supervised", "reinforcement"
WAYS = (SELF, SUPERVISED, REINFORCED)
KINDS = ("rouge1", "rouge2", "rougeL")
DRAWN = ("reward", "kl", "length")
ANSWER = "answer"  # the field that the reward reads


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option(DECODER, "bundled")
    chat: str = option("conversations, .jsonl or .json, or bundled-answers", "bundled-answers")
    chat_template: str | None = option(
        f"{', '.join(TEMPLATES)}, or a file (default: the model's; of bundled: plain)", None
    )
    seeds: int = option("runs of each way; below five nothing is decided", 5)
    steps: int = with_default(TrainingOptions, "steps", 60)
    rounds: int = option("updates by reinforcement", 30)
    batch_size: int = with_default(TrainingOptions, "batch_size", 8)
    sequence_length: int = option("tokens of a row; longer rows are left out", 64)
    heldout: float = with_default(TrainingOptions, "heldout", 0.3)
    judged: int = option("held-out rows that are answered, at most", 64)
    max_new_tokens: int = option("of an answer, at most", 16)
    generations: int = option("answers drawn for a prompt", 8)
    lr: float = option("peak rate of the first two ways", 5e-3)
    reward_lr: float = option("peak rate of reinforcement", 1e-3)
    beta: float = option("factor of the divergence from the supervised model", 0.04)

    def training(self, steps: int, lr: float) -> TrainConfig:
        """How a way trains."""
        return TrainConfig(steps, lr=lr, warmup_steps=steps // 10, snapshot_every=100)

    @property
    def template(self) -> str | None:
        return (
            "plain"
            if self.chat_template is None and self.model == "bundled"
            else (self.chat_template)
        )


# --- the task -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The rows for a model.

    Attributes:
        whole, answers: rows to learn from, with every token as a label, and the answers' alone.
        learned, judged: prompts to learn from, and held out, with their answers.
        text: ids of a prompt and of its completion -> the completion's text.
        ends: ids that end an answer.
        dropped: rows that are too long.
    """

    whole: list[Example]
    answers: list[Example]
    learned: list[Prompt]
    judged: list[Prompt]
    text: Callable[[Sequence[int], Sequence[int]], str]
    ends: set[int]
    dropped: int


def read_task(decoder: Decoder, settings: Settings) -> Task:
    """The rows, the same split for every seed.

    Raises:
        ValueError: a row cannot be written by the template, or none fits.
    """
    directory, tokenizer = find(settings.model), decoder.tokenizer
    template = ChatTemplate.choose(settings.template, directory, tokenizer)
    encoder = Encoder(tokenizer, lambda: template, chat=True)
    rows = numbered_rows(settings.chat)
    pairs = [(row, example(row, template, tokenizer)) for row in rows]
    kept = [(row, taught) for row, taught in pairs if len(taught) <= settings.sequence_length]
    if len(kept) < 2:
        raise ValueError(
            f"{rows_file(settings.chat)}: {len(kept)} of {len(rows)} rows have at most "
            f"--sequence-length {settings.sequence_length} tokens, must be two"
        )
    learned, rest = split_rows(kept, settings.heldout, seed=0)
    ends = ends_of(directory, tokenizer)
    return Task(
        [whole(taught) for _, taught in learned],
        [taught for _, taught in learned],
        [prompt(row, encoder) for row, _ in learned],
        [prompt(row, encoder) for row, _ in rest[: settings.judged]],
        lambda asked, ids: encoder.text(asked, ids, ends),
        ends,
        len(rows) - len(kept),
    )


def whole(taught: Example) -> Example:
    """The same row with every token as a label."""
    labels = torch.cat([taught.input_ids[1:], taught.labels[-1:]])
    return Example(taught.input_ids, labels)


def prompt(row: Row, encoder: Encoder) -> Prompt:
    *before, answer = row.messages
    return Prompt(encoder.prompt(before, row.where), "", {ANSWER: answer["content"]})


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """One for each seed."""
    at_least(settings, 2, "seeds")
    positive(settings, "steps", "rounds", "batch_size", "sequence_length", "judged")
    positive(settings, "max_new_tokens", "generations")
    check_heldout(settings.heldout)
    settings.training(settings.steps, settings.lr)
    settings.training(settings.rounds, settings.reward_lr)
    if settings.generations < 2:
        raise ValueError(f"generations is {settings.generations}, must be at least 2: a group")
    decoder = load_decoder(settings.model)
    needed = settings.sequence_length + settings.max_new_tokens
    if needed > (limit := decoder.model.max_tokens):
        raise ValueError(f"rows and answers need {needed} positions, the model has {limit}")
    read_task(decoder, settings)
    return [Part(f"seed-{seed}", run, (settings, seed)) for seed in range(settings.seeds)]


def run(folder: Path, settings: Settings, seed: int) -> Result:
    """Trains in all ways, and judges each."""
    decoder = load_decoder(settings.model)
    task = read_task(decoder, settings)
    start = decoder.model
    judged = {START: judge(start, None, task, settings, seed)}
    for way, examples in ((SELF, task.whole), (SUPERVISED, task.answers)):
        model = deepcopy(start)
        handle = attach(model, seed)
        batches = ShuffledRows(examples, Grouping(settings.batch_size), seed)
        config = settings.training(settings.steps, settings.lr)
        tokens = settings.batch_size * settings.sequence_length
        learn(folder / way, way, model, language_model_loss, batches, config, tokens)
        judged[way] = judge(model, handle, task, settings, seed)
    handle.fold()  # now the supervised model is where reinforcement starts
    handle = attach(model, seed)
    reinforce(folder / REINFORCED, model, handle, task, settings, seed)
    judged[REINFORCED] = judge(model, handle, task, settings, seed)
    return {"weights": decoder.weights, "dropped": task.dropped, "judged": judged}


def attach(model: Any, seed: int) -> Handle:
    """A LoRA on every linear layer but the head."""
    torch.manual_seed(seed)
    handle = methods.attach(model, MethodOptions(method="lora", target=["all-linear"]))
    assert handle is not None
    return handle


def sampler(model: Any, handle: Handle | None, task: Task, settings: Settings) -> Sampler:
    """What draws answers and scores them by ROUGE-L."""
    reward = rouge_l(ANSWER)

    def scores(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        return torch.tensor(reward([], texts, [p.fields for p in prompts]))

    return Sampler(
        policy=model,
        handle=handle,
        reference=Reference(model, "full" if handle is None else "lora"),
        score=scores,
        text=task.text,
        ends=task.ends,
        max_new_tokens=settings.max_new_tokens,
        rows=settings.batch_size,
    )


def reinforce(
    folder: Path, model: Any, handle: Handle, task: Task, settings: Settings, seed: int
) -> None:
    """GRPO on the prompts of the rows to learn from."""
    objective = REINFORCEMENTS["grpo"]
    chosen = Options(beta=settings.beta, kl="k3", generations=settings.generations)
    rounds = Rounds(
        *(sampler(model, handle, task, settings), objective, chosen, task.learned),
        batch_size=settings.batch_size * settings.generations,
        seed=seed,
    )
    learn(
        *(folder, REINFORCED, model, partial(objective.loss, options=chosen), rounds),
        settings.training(settings.rounds, settings.reward_lr),
        settings.batch_size * settings.generations * settings.max_new_tokens,
        probes=[rounds],
        dropout=False,
    )


def judge(
    model: Any, handle: Handle | None, task: Task, settings: Settings, seed: int
) -> dict[str, float]:
    """Mean ROUGE F of the most likely answers to the held-out prompts; of drawn ones the reward,
    the divergence from the model without its LoRA in nats, and the length in tokens.
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for start in range(0, len(task.judged), settings.batch_size):
        asked = task.judged[start : start + settings.batch_size]
        ids, mask = left_padded([p.ids for p in asked])
        with mode(model, training=False):
            out = generate(
                *(model, ids, settings.max_new_tokens, mask),
                temperature=0.0,
                eos_token_id=sorted(task.ends),
            )
        for p, row in zip(asked, out[:, ids.size(1) :].tolist(), strict=True):
            text = task.text(p.ids, before_end(row, task.ends))
            for kind, shares in score(text, p.fields[ANSWER], KINDS).items():
                found[kind].append(shares.f)
    drawn = sampler(model, handle, task, settings).measure(task.judged, [seed])
    means = {kind: fmean(values) for kind, values in found.items()}
    return means | {name: drawn[name] for name in DRAWN}


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the ways gave.

    Attributes:
        judged: way, or the start -> quantity -> by seed.
        dropped: rows that were too long.
    """

    settings: Settings
    judged: Mapping[str, Mapping[str, list[float]]]
    dropped: int
    weights: str = ""

    def mean(self, way: str, name: str) -> Estimate:
        return over_seeds(self.judged[way][name])

    def gain(self, way: str, before: str, name: str) -> Estimate:
        """How much more of a quantity one way has than another, seed by seed."""
        return over_seeds(differences(self.judged[way][name], self.judged[before][name]))


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    rows = [results[f"seed-{seed}"] for seed in range(settings.seeds)]
    judged = {
        way: {name: [row["judged"][way][name] for row in rows] for name in (*KINDS, *DRAWN)}
        for way in (START, *WAYS)
    }
    return Measured(settings, judged, rows[0]["dropped"], rows[0]["weights"])


def report(m: Measured) -> Report:
    """The answer, a table and verdicts."""
    return Report(TITLE, answer(m), tables(m), findings(m), {"judged": m.judged})


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    n = m.settings.seeds
    supervised, alone = (m.gain(way, START, "rougeL") for way in (SUPERVISED, SELF))
    return [
        f"ROUGE-L of the most likely answers {moves(supervised, n)} by supervised fine-tuning, "
        f"from {shown(m.mean(START, 'rougeL'))} at the start.",
        f"Self-supervised on the same rows, prompts among them, it {moves(alone, n)}.",
        f"Reinforcement after it: the reward, ROUGE-L of answers that are drawn, "
        f"{moves(m.gain(REINFORCED, SUPERVISED, 'reward'), n)}, at a divergence of "
        f"{shown(m.mean(REINFORCED, 'kl'))} nats from the supervised model.",
    ]


def findings(m: Measured) -> list[Finding]:
    """The verdicts."""
    s = m.settings
    on = ran_on(s.model, [s.chat], s.seeds, m.weights)
    likely = "the most likely answers, above the start's"
    drawn = "answers drawn at temperature 1, above the supervised model's"
    compared = {
        "survey.self-supervised": (SELF, START, "rougeL", likely),
        "survey.supervised": (SUPERVISED, START, "rougeL", likely),
        "survey.reward": (REINFORCED, SUPERVISED, "reward", drawn),
    }
    found = []
    for claim, (way, before, name, what) in compared.items():
        gain = m.gain(way, before, name)
        verdict = above(gain, s.seeds)
        found.append(Finding(claim, shown(gain), verdict, on, f"ROUGE-L of {what}"))
    return found


def tables(m: Measured) -> list[Table]:
    """Every quantity of every way."""
    names = {
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
        "reward": "reward",
        "kl": "divergence, nats",
        "length": "length, tokens",
    }
    return [
        Table(
            "Held-out rows",
            ["", *names.values()],
            [[way, *(shown(m.mean(way, name)) for name in names)] for way in (START, *WAYS)],
            "ROUGE: F of the most likely answers. Reward, divergence from the model that the way "
            "started from, and length: of answers drawn at temperature 1. Means over seeds with "
            f"Student's interval. {m.dropped} rows were too long and left out.",
        )
    ]


# --- figures ------------------------------------------------------------------------------------

STYLES = dict(zip((START, *WAYS), ({"color": "#6b6b6b"}, FULL, FROZEN, *OTHERS), strict=False))


def draw(m: Measured, figures: Figures) -> None:
    """ROUGE and the reward of each way."""
    names = (*KINDS, "reward")
    with figures.add(
        "ways.png",
        "ROUGE F of the most likely answers, and the reward, ROUGE-L of drawn ones, on rows held "
        "out; means over seeds with Student's interval.",
        height=4.2,
    ) as axes:
        for i, name in enumerate(names):
            for j, way in enumerate((START, *WAYS)):
                label = {"label": way} if i == 0 else {}
                bar(axes, 2 * i + 0.4 * j, m.mean(way, name), color=STYLES[way]["color"], **label)
        axes.set_xticks([2 * i + 0.6 for i in range(len(names))], names)
        axes.set(ylabel="F")
        axes.legend()
