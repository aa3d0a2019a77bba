"""`minigpt align`: a model learns from preferences, or from rewards of what it writes itself.

    minigpt align --objective reward --model bundled-bert --data pairs.jsonl --out runs/reward
    minigpt align --objective dpo --model smollm2 --data pairs.jsonl --out runs/dpo
    minigpt align --objective grpo --model smollm2 --data rows.jsonl --reward exact --out runs/grpo

The objectives are those of minigpt/objectives, preference.py and reinforcement.py.  All train
without dropout, so that the policy that is sampled is the one that is trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minigpt.checkpoints.directory import load, outline
from minigpt.checkpoints.source import find
from minigpt.commands.align_options import BETA, Align
from minigpt.commands.command import Run
from minigpt.commands.tuning import costs
from minigpt.data.chat import ChatTemplate
from minigpt.data.conversations import split_rows
from minigpt.data.preferences import Encoder, plain, read_pairs, read_prompts, rows_file
from minigpt.data.text import Batch
from minigpt.data.tokenizer import MARKS, Tokenizer
from minigpt.models.architecture import Decoder, Model
from minigpt.objectives.classify import new_modules
from minigpt.objectives.pairs import (
    Completions,
    Dpo,
    Pairs,
    Scores,
    Texts,
    collate_completions,
    collate_texts,
    loss_and_accuracy,
    preference_loss,
    reward_scores,
)
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, ActorCritic
from minigpt.objectives.rewards import Reward, joined, marked, reward_files, reward_of
from minigpt.objectives.supervised import ends_of
from minigpt.settings import runs
from minigpt.settings.manifest import model_files
from minigpt.training import memory
from minigpt.training.progress import progress_bar, say
from minigpt.training.rounds import HELDOUT, Prompt, Rounds, Sampler
from minigpt.training.trackers.follow import tracked
from minigpt.training.train import Loss, Row, train
from peft_lite import report, storage
from peft_lite.handle import Handle

MEASURED = 64  # held-out prompts that are completed, at most
SHOWN = 2  # of them in sample.txt
X = TypeVar("X")
Y = TypeVar("Y", Completions, Texts)
Parts = tuple[list[X], list[X]]  # to learn from, and held out


@dataclass(frozen=True)
class Job:
    """A run of the command: settings, folder, whether it resumes, the model's files."""

    settings: Align
    out: Path
    resume: bool
    directory: Path
    tokenizer: Tokenizer

    @cached_property
    def encoder(self) -> Encoder:
        """Rows into ids."""
        template = partial(ChatTemplate.load, self.directory)
        return Encoder(self.tokenizer, template, self.settings.chat)

    def fitting(self, rows: Sequence[X], size: Callable[[X], int], limit: int) -> list[X]:
        """The rows of at most `limit` tokens; says how many are left out.

        Raises:
            ValueError: all are.
        """
        short = [row for row in rows if size(row) <= limit]
        if not short:
            raise ValueError(f"{self.settings.data}: every row has more than {limit} tokens")
        if len(short) < len(rows):
            n = len(rows) - len(short)
            say(f"{n:,} of {len(rows):,} rows have more than {limit} tokens: left out")
        return short

    def split(self, rows: Sequence[X]) -> Parts[X]:
        """Rows to learn from, and held out."""
        return split_rows(rows, self.settings.heldout, self.settings.seed)

    def train(
        self, model: nn.Module, loss: Loss, batches: Callable[[int], Batch], **more: Any
    ) -> list[Row]:
        """Trains without dropout, with a progress bar."""
        s = self.settings
        with (
            progress_bar(s.objective, s.steps, s.tokens_a_step) as show,
            tracked(s.track, self.out, asdict(s), show) as observe,
        ):
            return train(
                *(model, loss, batches, s, self.out),
                resume=self.resume,
                observe=observe,
                dropout=False,
                **more,
            )


@dataclass(frozen=True)
class Outcome:
    """What a run gave: its rows of metrics, what its summary says, and a text to show."""

    rows: Sequence[Row]
    summary: dict[str, object]
    sample: str = ""


# --- preferences --------------------------------------------------------------------------------


def read_texts(job: Job) -> Parts[Texts]:
    """The pairs as an encoder reads them; of a long one the end."""
    limit, encode = job.settings.sequence_length, job.tokenizer.encode
    ids = [
        [encode(joined(plain(pair.prompt), plain(text))) for text in (pair.chosen, pair.rejected)]
        for pair in read_pairs(job.settings.data)
    ]
    if cut := sum(len(row) > limit - MARKS for pair in ids for row in pair):
        say(f"{cut:,} of {2 * len(ids):,} texts have more than {limit} tokens: their end is read")
    pairs = [Texts(*(marked(row, job.tokenizer, limit) for row in pair)) for pair in ids]
    return job.split(different(pairs))


def read_completions(job: Job) -> Parts[Completions]:
    """The pairs as a decoder reads them."""
    encoder, pairs = job.encoder, []
    for pair in read_pairs(job.settings.data):
        texts = (pair.chosen, pair.rejected)
        answers = (encoder.completion(pair.prompt, text, pair.where) for text in texts)
        pairs.append(Completions(encoder.prompt(pair.prompt, pair.where), *answers))
    limit = job.settings.sequence_length
    return job.split(job.fitting(different(pairs), lambda pair: pair.length, limit))


def different(pairs: Sequence[Y]) -> list[Y]:
    """The pairs of two completions; says how many have twice the same, from which nothing follows.

    Raises:
        ValueError: all have.
    """
    kept = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not kept:
        raise ValueError("every pair has twice the same completion")
    if len(kept) < len(pairs):
        n = len(pairs) - len(kept)
        say(f"{n:,} of {len(pairs):,} pairs have twice the same completion: left out")
    return kept


def learn_pairs(
    job: Job, model: Model, scores: Scores, learned: Pairs[Y], rest: Pairs[Y]
) -> Outcome:
    """Learns to score what is preferred higher."""
    loss, heldout = preference_loss(scores), list(rest.consecutive())

    def measured(moment: str) -> dict[str, object]:
        nats, accuracy = loss_and_accuracy(model, scores, heldout, job.settings.bf16)
        return {f"heldout_loss_{moment}": nats, f"preference_accuracy_{moment}": accuracy}

    before = measured("before")
    rows = job.train(model, loss, learned, heldout=heldout)
    numbers = {"train_rows": len(learned.pairs), "heldout_rows": len(rest.pairs)}
    return Outcome(rows, {**numbers, **before, **measured("after")})


def learn_scores(job: Job, model: Model, data: Parts[Texts]) -> Outcome:
    """A reward model."""
    s, collate = job.settings, partial(collate_texts, pad=job.tokenizer.special.pad)
    learned, rest = (Pairs(part, s.batch_size, s.seed, collate) for part in data)
    return learn_pairs(job, model, reward_scores, learned, rest)


def learn_preferences(
    job: Job, model: Decoder, handle: Handle | None, reference: Reference, data: Parts[Completions]
) -> Outcome:
    """DPO; then the divergence and the length of what the policy writes."""
    s = job.settings
    scores = Dpo(BETA if s.beta is None else s.beta, reference, handle)
    learned, rest = (Pairs(part, s.batch_size, s.seed, collate_completions) for part in data)
    outcome = learn_pairs(job, model, scores, learned, rest)
    prompts = [Prompt(pair.prompt, "", {}) for pair in rest.pairs[:MEASURED]]
    room = model.max_tokens - max(len(prompt.ids) for prompt in prompts)
    sampler = sampler_of(job, model, handle, reference, no_reward, room)
    drawn = sampler.measure(prompts, [s.seed, HELDOUT])
    return Outcome(outcome.rows, {**outcome.summary, **{n: drawn[n] for n in ("kl", "length")}})


# --- rewards ------------------------------------------------------------------------------------


def no_reward(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Any]
) -> Sequence[float]:
    """0 for each."""
    return [0.0] * len(completions)


def sampler_of(
    job: Job,
    model: Decoder,
    handle: Handle | None,
    reference: Reference,
    reward: Reward,
    room: int,
) -> Sampler:
    """What draws completions of at most `room` tokens and scores them."""
    ends = ends_of(job.directory, job.tokenizer)
    device = next(model.parameters()).device

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        asked, fields = [p.text for p in prompts], [p.fields for p in prompts]
        return torch.tensor(reward(asked, texts, fields), device=device)

    return Sampler(
        policy=model,
        handle=handle,
        reference=reference,
        score=score,
        text=lambda prompt, ids: job.encoder.text(prompt, ids, ends),
        ends=ends,
        max_new_tokens=min(job.settings.new_tokens, room),
        rows=job.settings.batch_size,
    )


def read_policy_prompts(job: Job) -> Parts[Prompt]:
    """The prompts that leave room for a completion."""
    encoder = job.encoder
    prompts = [
        Prompt(encoder.prompt(row.prompt, row.where), plain(row.prompt), row.fields)
        for row in read_prompts(job.settings.data)
    ]
    limit = job.settings.sequence_length - job.settings.new_tokens
    return job.split(job.fitting(prompts, lambda prompt: len(prompt.ids), limit))


def learn_rewards(
    job: Job,
    model: Decoder,
    handle: Handle | None,
    reference: Reference,
    data: Parts[Prompt],
    reward: Reward,
) -> Outcome:
    """REINFORCE, RLOO, GRPO or PPO."""
    s = job.settings
    objective = REINFORCEMENTS[s.objective]
    options = s.options(objective)
    learned, rest = data[0], data[1][:MEASURED]
    sampler = sampler_of(job, model, handle, reference, reward, s.new_tokens)
    critic = ActorCritic(model) if objective.critic else None
    rounds = Rounds(
        *(sampler, objective, options, learned),
        batch_size=s.batch_size,
        accumulate=s.accumulate,
        iterations=s.updates,
        seed=s.seed,
        critic=critic,
        heldout=rest,
        every=s.evaluate_every,
    )
    seed = [s.seed, HELDOUT]
    before, text = sampler.measure(rest, seed), shown(sampler, rest[:SHOWN], seed)
    rows = job.train(
        critic or model,
        partial(objective.loss, options=options),
        rounds,
        probes=[rounds],
        period=s.updates,
    )
    after = sampler.measure(rest, seed)
    sample = f"--- before ---\n{text}\n\n--- after ---\n{shown(sampler, rest[:SHOWN], seed)}\n"
    if critic is not None:
        tensors = {name: p.detach() for name, p in critic.value.named_parameters()}
        storage.write_tensors(job.out / "value.safetensors", tensors)
    summary: dict[str, object] = {
        "reward": s.reward,
        "train_rows": len(learned),
        "heldout_rows": len(data[1]),
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "kl": after["kl"],
        "length_before": before["length"],
        "length": after["length"],
        "ended": after["ended"],
    }
    return Outcome(rows, summary, sample)


def shown(sampler: Sampler, prompts: Sequence[Prompt], seed: Sequence[int]) -> str:
    """Prompts with what the policy makes of them, and its reward."""
    drawn, round = sampler.draw(prompts, seed)
    texts = [
        sampler.text(prompt.ids, ids)
        for prompt, ids in zip(prompts, drawn.completions(), strict=True)
    ]
    parts = zip(prompts, texts, round.scores.tolist(), strict=True)
    return "\n\n".join(f"{p.text}\n>>> {text}\n(reward {r:.3g})" for p, text, r in parts)


# --- the command --------------------------------------------------------------------------------

READERS: dict[str, Callable[[Job], Any]] = {"reward": read_texts, "dpo": read_completions}


def align(settings: Align, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes to OUT `model/` (full, freeze) or `adapter/` (all others), for ppo
    `value.safetensors`, `metrics.jsonl`, `sample.txt` and `summary.json`; returns the summary.
    """
    device = settings.find_device()
    before_model = memory.resident()
    settings = settings.with_rate()
    scoring = settings.objective == "reward"
    head = "classification" if scoring else "causal-lm"
    outline(settings.model, head)  # a model without such a head is refused at once
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    job = Job(settings, out, resume, directory, tokenizer)
    data: Any = READERS.get(settings.objective, read_policy_prompts)(job)
    reward = no_reward if settings.reward is None else reward_of(settings.reward)
    files = {} if settings.reward is None else reward_files(settings.reward)
    torch.manual_seed(settings.seed)  # of new modules
    model: Any = load(directory, head, num_labels=1 if scoring else None, device=device)
    tokenizer.check(model.config.vocab_size)
    reference = None if scoring else Reference(model, settings.method)
    handle = settings.attach(model, new_modules(model) if scoring else ())
    counts = report(model)
    inputs = {"rows": [rows_file(settings.data)], **model_files(directory), **files}
    runs.claim(out, "align", settings, inputs)

    if reference is None:
        outcome = learn_scores(job, model, data)
    elif settings.objective == "dpo":
        outcome = learn_preferences(job, model, handle, reference, data)
    else:
        outcome = learn_rewards(job, model, handle, reference, data, reward)

    result = settings.write(model, handle, tokenizer, directory, out)
    if outcome.sample:
        storage.write_text(out / "sample.txt", outcome.sample)
    summary: dict[str, object] = {
        "objective": settings.objective,
        "method": settings.method,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        **outcome.summary,
        **costs(outcome.rows, before_model, result),
        "config": asdict(settings),
    }
    runs.complete(out, summary)
    return summary


COMMAND = Run(Align, align)
