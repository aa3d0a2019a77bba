"""Write-up 004: reinforcement is a way to fine-tune.  How near does each objective come to what it
is meant to reach?

    J(pi) = E_pi[r] - beta KL(pi | pi_ref)          pi* ~ pi_ref exp(r / beta)

Three letters and an end token, at most three tokens: 40 completions.  All of them can be counted.
So J, its gradient and its optimum pi* are known exactly, and KL(pi | pi*) tells how far a policy is
from the optimum:  J(pi*) - J(pi) = beta KL(pi | pi*).

The policy is a table, a softmax for each beginning of a completion, so that it can be pi*.  What
learns it are the losses of `minigpt align`, with the same number of completions a step for all.
Each seed has another world: other rewards, another reference, other draws.

Measured are the course of KL(pi | pi*), the variance of each estimator at the start, by the sum
over all pairs of completions, and where GRPO ends.  With pairs of completions its mean gradient is
such a sum, too, and its own fixed point is where that is 0.  With the divergence in the reward (k1)
that is pi*, where all completions have the same reward, so that it does not matter by what their
differences are divided.  With the divergence in the loss (k3) it is another policy, and yet another
one where advantages are divided by the standard deviation.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.data.text import IGNORED, Batch
from minigpt.metrics.intervals import Estimate, mean
from minigpt.models.config import positive
from minigpt.objectives import policy
from minigpt.objectives.advantages import group_relative
from minigpt.objectives.logprobs import completion_logprobs
from minigpt.objectives.preference import bradley_terry, dpo_scores
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options, Reinforcement, Round
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, above, all_of
from minigpt.studies.figures import FROZEN, FULL, OTHERS, Figures, line
from minigpt.studies.lab import Part, Result
from minigpt.studies.report import Report, Table
from minigpt.studies.training import at_least
from minigpt.studies.words import enough
from minigpt_kernels import ClippedAdamW

TITLE = "Reinforcement where every completion can be counted (write-up 004)"
SOURCES: Mapping[str, str] = {}  # it has a world of its own
PUBLISHED = {"steps": 400}
LETTERS, LENGTH, END = 3, 3, 0
V = LETTERS + 1
STATES = V**LENGTH  # numbers of beginnings, not all of which there are
POINTS = 40  # of the curves
UPDATES, ZERO = 400, 1e-9  # of the search for a fixed point, and a gradient that counts as none


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    seeds: int = option("worlds; below five nothing is decided", 5)
    steps: int = with_default(TrainingOptions, "steps", 150)
    completions: int = option("of a step", 16)
    lr: float = option("rate, which falls to 0", 0.1)
    beta: float = option("factor of the divergence", 0.5)


# --- the world ----------------------------------------------------------------------------------


def completions() -> Tensor:
    """Every completion, (N, LENGTH): ids, -100 after the end."""
    letters = range(1, V)
    ended = [[*head, END] for n in range(LENGTH) for head in product(letters, repeat=n)]
    rows = [*ended, *map(list, product(letters, repeat=LENGTH))]
    return torch.tensor([row + [IGNORED] * (LENGTH - len(row)) for row in rows])


class TablePolicy(nn.Module):
    """A softmax for each beginning of a completion, and a value.

    It is a decoder whose states are one-hot, so that the head's weight (V, STATES) is the table.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(STATES, V, bias=False, dtype=torch.float64)
        self.value = nn.Linear(STATES, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(logits)
            self.value.weight.zero_()

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T), the first a start token -> one-hot states (B, T, STATES)."""
        places = V ** torch.arange(input_ids.size(1)) // V  # 0, 1, V, V^2
        numbers = (input_ids * places).cumsum(1) % STATES
        return F.one_hot(numbers, STATES).double()

    def values(self, states: Tensor) -> Tensor:
        """States (B, C, STATES) -> (B, C)."""
        values: Tensor = self.value(states)
        return values[..., 0]


class World:
    """Rewards and a reference, drawn by a seed."""

    def __init__(self, seed: int, beta: float) -> None:
        random = torch.Generator().manual_seed(seed)
        self.completion = completions()
        self.mask = (self.completion != IGNORED).double()
        ones = torch.ones(len(self.completion), 1, dtype=torch.long)
        self.ids = torch.cat([ones, self.completion.clamp(min=0)], 1)
        self.real = torch.cat([ones, self.mask.long()], 1)
        self.beta = beta
        self.logits = torch.randn(V, STATES, generator=random, dtype=torch.float64)
        self.rewards = torch.randn(len(self.ids), generator=random, dtype=torch.float64)
        self.reference = self.logprobs(TablePolicy(self.logits)).detach()

    def logprobs(self, model: TablePolicy) -> Tensor:
        """Log pi of each token of each completion, (N, LENGTH)."""
        return completion_logprobs(model, self.ids, self.real, self.completion)

    def objective(self, log_pi: Tensor) -> Tensor:
        """J of log pi(y), (N,)."""
        # J = sum_y pi(y) (r(y) - beta log(pi(y) / pi_ref(y)))
        d = log_pi - self.reference.sum(1)
        return (log_pi.exp() * (self.rewards - self.beta * d)).sum()

    def optimum(self) -> Tensor:
        """Log pi*, (N,)."""
        # pi* ~ pi_ref exp(r / beta)
        return (self.reference.sum(1) + self.rewards / self.beta).log_softmax(0)

    def table(self, log_pi: Tensor) -> Tensor:
        """The logits (V, STATES) of a policy over completions, log pi (N,)."""
        mass = torch.zeros(V, STATES, dtype=torch.float64)
        numbers = TablePolicy(self.logits).hidden(self.ids)[:, :-1].argmax(-1)
        for t in range(LENGTH):
            real = self.completion[:, t] != IGNORED
            place = (self.completion[real, t], numbers[real, t])
            mass.index_put_(place, log_pi[real].exp(), accumulate=True)
        return mass.log().where(mass > 0, self.logits)

    def round(self, model: TablePolicy, rows: Tensor) -> Round:
        """What those completions got."""
        with torch.no_grad():
            logprobs = self.logprobs(model)[rows]
            values = model.values(model.hidden(self.ids[rows])[:, :-1])
        scores, mask, reference = self.rewards[rows], self.mask[rows], self.reference[rows]
        return Round(scores, mask, logprobs, reference, values)

    def batch(self, rows: Tensor) -> Batch:
        """The tokens of those completions."""
        return {
            "input_ids": self.ids[rows],
            "attention_mask": self.real[rows],
            "labels": self.completion[rows],
        }


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p | q) in nats, of log-probabilities of all completions, (N,)."""
    return float((log_p.exp() * (log_p - log_q)).sum())


# --- the objectives -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """An objective with its options."""

    name: str
    about: str = ""
    kl: str = "k1"
    generations: int = 2
    scaled: bool = False
    baseline: bool = True
    average: str = "sum"

    def options(self, beta: float) -> Options:
        return Options(
            beta=beta,
            kl=self.kl,
            generations=self.generations,
            scaled=self.scaled,
            average=self.average,
            baseline=self.baseline,
        )

    @property
    def objective(self) -> Reinforcement:
        return REINFORCEMENTS[self.name]


EXACT, DPO = "exact gradient", "DPO"
ARMS: Mapping[str, Arm] = {
    "REINFORCE": Arm("reinforce", baseline=False),
    "REINFORCE, baseline": Arm("reinforce"),
    "RLOO": Arm("rloo"),
    "PPO": Arm("ppo"),
    "GRPO, k1": Arm("grpo"),
    "GRPO, k1, scaled": Arm("grpo", scaled=True),
    "GRPO, k3": Arm("grpo", kl="k3"),
    "GRPO, k3, scaled": Arm("grpo", kl="k3", scaled=True),
}
GRPO = [name for name in ARMS if name.startswith("GRPO")]
NAMES = (EXACT, DPO, *ARMS)
TOWARDS = (EXACT, DPO, "REINFORCE", "REINFORCE, baseline", "RLOO", "PPO", "GRPO, k1")  # pi*


def learn(world: World, name: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Trains a table from the reference on; KL(pi | pi*) and J at some steps, and log pi at the
    end.
    """
    model = TablePolicy(world.logits)
    random = torch.Generator().manual_seed(seed)
    parameters = [*model.parameters()]
    optimizer = ClippedAdamW(parameters, settings.lr, weight_decay=0.0, max_norm=math.inf)
    every = max(1, settings.steps // POINTS)
    star = world.optimum()
    course = []
    for t in range(settings.steps + 1):
        if t % every == 0 or t == settings.steps:
            with torch.no_grad():
                log_pi = world.logprobs(model).sum(1)
            gap, J = divergence(log_pi, star), float(world.objective(log_pi))
            course.append((t, gap, J))
        if t == settings.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - t / settings.steps)
        for loss in losses(world, name, model, settings, random):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"course": course, "log_pi": log_pi.tolist()}


def losses(
    world: World,
    name: str,
    model: TablePolicy,
    settings: Settings,
    random: torch.Generator,
) -> Iterator[Tensor]:
    """The loss of each update of a step; PPO has several on the same completions."""
    n = settings.completions
    if name == EXACT:
        yield -world.objective(world.logprobs(model).sum(1))
    elif name == DPO:
        pairs = torch.multinomial(
            world.reference.sum(1).exp(), n, replacement=True, generator=random
        ).view(-1, 2)
        r = world.rewards[pairs]
        first = torch.rand(len(pairs), generator=random, dtype=torch.float64)
        preferred = (first >= torch.sigmoid(r[:, 0] - r[:, 1])).long()
        log_pi, reference = world.logprobs(model).sum(1)[pairs], world.reference.sum(1)[pairs]
        yield bradley_terry(dpo_scores(log_pi, reference, world.beta), preferred)
    else:
        arm = ARMS[name]
        options = arm.options(world.beta)
        pi = world.logprobs(model).detach().sum(1).exp()
        rows = torch.multinomial(pi, n, replacement=True, generator=random)
        columns = arm.objective.batch(world.round(model, rows), options)
        batch = {**world.batch(rows), **columns}
        for _ in range(arm.objective.iterations):
            yield arm.objective.loss(model, batch, options)


# --- exact quantities ---------------------------------------------------------------------------


def spread(world: World, name: str) -> tuple[float, float]:
    """Of the gradient that a pair of completions gives at the reference, by the sum over all pairs:
    its variance, summed over the table, over the square of its mean; and the cosine of the angle
    between its mean and the exact gradient.
    """
    model = TablePolicy(world.logits)
    pairs = torch.combinations(torch.arange(len(world.ids)), 2, with_replacement=True)
    g = gradients(world, model, ARMS[name], pairs)
    pi = world.reference.sum(1).exp()
    p = pi[pairs].prod(1) * (1 + (pairs[:, 0] < pairs[:, 1]))  # the order does not matter
    mean_g = p @ g
    square = float(mean_g @ mean_g)
    (exact,) = torch.autograd.grad(
        world.objective(world.logprobs(model).sum(1)), [model.head.weight]
    )
    cosine = float(mean_g @ exact.flatten()) / (square**0.5 * float(exact.norm()))
    return float(p @ (g * g).sum(1)) / square - 1, cosine


def gradients(world: World, model: TablePolicy, arm: Arm, pairs: Tensor) -> Tensor:
    """The direction in which each pair of completions (M, 2) moves the table, (M, V * STATES)."""
    options, token = arm.options(world.beta), scores_of_tokens(world, model)
    # what has no baseline of the whole round takes all pairs as the groups of a single round
    grouped = arm.objective.generations > 1 or (arm.name == "reinforce" and not arm.baseline)
    parts = []
    for rows in [pairs.flatten()] if grouped else pairs:
        columns = arm.objective.batch(world.round(model, rows), options)
        logprobs = world.logprobs(model).detach()[rows].requires_grad_()
        losses = arm.objective.losses(logprobs, columns, options)
        if options.kl == "k3":
            losses = losses + options.beta * policy.k3(logprobs, columns["reference"])
        n = int(world.mask[rows].sum())
        loss = policy.weighted_mean(losses, columns["weights"], n) * (len(rows) / 2)
        (d,) = torch.autograd.grad(loss, logprobs)
        parts.append(-torch.einsum("mgc,mgcp->mp", d.view(-1, 2, LENGTH), token[rows.view(-1, 2)]))
    return torch.cat(parts)


def scores_of_tokens(world: World, model: TablePolicy) -> Tensor:
    """D log pi(y_t) / d table, (N, LENGTH, V * STATES): onehot(y_t) - pi, in the column of the
    state.
    """
    states = model.hidden(world.ids)[:, :-1]
    pi = model.head(states).detach().softmax(-1)
    chosen = F.one_hot(world.completion.clamp(min=0), V).double() - pi
    score = chosen[..., :, None] * states[..., None, :] * world.mask[..., None, None]
    return score.flatten(2)


def fixed_point(world: World, name: str) -> tuple[Tensor, float]:
    """Where the mean gradient of GRPO on pairs of completions is 0: log pi (N,), and the largest
    number of the gradient that is left.
    """
    options = ARMS[name].options(world.beta)
    model = TablePolicy(world.table(world.optimum()))  # which it is, with k1
    optimizer = torch.optim.Adam([model.head.weight], 0.1)
    for t in range(UPDATES):
        (d,) = torch.autograd.grad(mean_loss(world, model, options), [model.head.weight])
        if d.abs().max() < ZERO:
            break
        model.head.weight.grad = d
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (10 * t / UPDATES)
        optimizer.step()
    return world.logprobs(model).detach().sum(1), float(d.abs().max())


def mean_loss(world: World, model: TablePolicy, options: Options) -> Tensor:
    """A loss whose gradient is the mean over all pairs of completions of that of GRPO's loss."""
    logprobs = world.logprobs(model)
    fixed = logprobs.detach()
    pi, N = fixed.sum(1).exp(), len(fixed)
    every = torch.arange(N)
    round = Round(world.rewards, world.mask, fixed, world.reference)
    R = round.rewards(options)
    pairs = torch.stack([R[every.repeat_interleave(N)], R[every.repeat(N)]], 1)
    A = group_relative(pairs, options.scaled)[:, 0].view(N, N)
    # sum_y pi(y) A(y) log pi(y),  A(y) the mean over the other completion of the pair
    loss = -(pi * (A @ pi) * logprobs.sum(1)).sum()
    if options.kl == "k3":
        loss = loss + options.beta * (pi * policy.k3(logprobs, world.reference).sum(1)).sum()
    return loss


# --- parts, measurements and claims -------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """One for each seed."""
    positive(settings, "completions")
    at_least(settings, 2, "seeds", "steps", "completions")
    if settings.completions % 2:
        raise ValueError(f"completions is {settings.completions}, must be even: they go in pairs")
    for name in ("lr", "beta"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(settings, name)}, must be a positive number")
    return [Part(f"seed-{seed}", run, (settings, seed)) for seed in range(settings.seeds)]


def run(folder: Path, settings: Settings, seed: int) -> Result:
    """All objectives in one world."""
    world = World(seed, settings.beta)
    star = world.optimum()
    runs = {name: learn(world, name, settings, seed) for name in NAMES}
    ends: dict[str, dict[str, float]] = {}
    for name in GRPO:
        log_pi, left = fixed_point(world, name)
        learned = torch.tensor(runs[name]["log_pi"], dtype=torch.float64)
        ends[name] = {
            "from_optimum": divergence(log_pi, star),
            "learned_from_optimum": divergence(learned, star),
            "learned_from_fixed_point": divergence(learned, log_pi),
            "gradient_left": left,
        }
    spreads = {name: spread(world, name) for name in ARMS} if seed == 0 else {}
    reference = world.reference.sum(1)
    return {
        "course": {name: runs[name]["course"] for name in NAMES},
        "start": divergence(reference, star),
        "J": {
            "start": float(world.objective(reference)),
            "best": float(world.objective(star)),
        },
        "ends": ends,
        "spreads": spreads,
    }


@dataclass(frozen=True)
class Measured:
    """What the runs gave.

    Attributes:
        steps: at which the curves have a point.
        gaps: objective -> seed -> KL(pi | pi*) at these steps.
        gains: objective -> by seed, the share of J(pi*) - J(pi_ref) that was gained.
        ends: a GRPO -> quantity -> by seed.
        spreads: objective -> variance over the mean's square, and cosine, in the first world.
    """

    settings: Settings
    steps: list[int]
    gaps: dict[str, list[list[float]]]
    gains: dict[str, list[float]]
    ends: dict[str, dict[str, list[float]]]
    spreads: dict[str, tuple[float, float]]

    def end(self, name: str) -> Estimate:
        """KL(pi | pi*) after the last step."""
        return mean([gaps[-1] for gaps in self.gaps[name]])

    def gain(self, name: str) -> Estimate:
        return mean(self.gains[name])


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    rows = [results[f"seed-{seed}"] for seed in range(settings.seeds)]

    def gained(row: Result, name: str) -> float:
        start, best = row["J"]["start"], row["J"]["best"]
        return (row["course"][name][-1][2] - start) / (best - start)

    return Measured(
        settings,
        [step for step, _, _ in rows[0]["course"][EXACT]],
        {name: [[gap for _, gap, _ in row["course"][name]] for row in rows] for name in NAMES},
        {name: [gained(row, name) for row in rows] for name in NAMES},
        {
            name: {key: [row["ends"][name][key] for row in rows] for key in rows[0]["ends"][name]}
            for name in GRPO
        },
        {name: (v, c) for name, (v, c) in rows[0]["spreads"].items()},
    )


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    numbers = {"ends": m.ends, "gains": m.gains, "spreads": m.spreads}
    return Report(TITLE, answer(m), tables(m), findings(m), numbers)


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    seeds = enough(m.settings.seeds, "world")
    near = min((name for name in TOWARDS if name != EXACT), key=lambda name: m.end(name).value)
    away, own = (
        {name: mean(m.ends[name][key]) for name in GRPO}
        for key in ("from_optimum", "learned_from_fixed_point")
    )
    plain, others = m.spreads["REINFORCE"][0], m.spreads["RLOO"][0]
    return [
        f"After {m.settings.steps} steps of {m.settings.completions} completions ({seeds}) the "
        f"policy nearest to pi* is that of {near}, {m.end(near)} nats away; PPO's is "
        f"{m.end('PPO')}, DPO's {m.end(DPO)}, and the exact gradient's {m.end(EXACT)}.",
        f"GRPO with the divergence in its loss has another end: its fixed point lies "
        f"{away['GRPO, k3']} nats from pi*, {away['GRPO, k3, scaled']} with advantages over the "
        f"standard deviation; what it learns lies {own['GRPO, k3']} and "
        f"{own['GRPO, k3, scaled']} nats from these points.",
        f"The variance of the gradient of two completions is {plain:.3g} times the square of its "
        f"mean for REINFORCE, and {others:.3g} times with the other completion as the baseline.",
    ]


def findings(m: Measured) -> list[Finding]:
    """The verdict."""
    gains = {name: m.gain(name) for name in ARMS}
    least = min(gains, key=lambda name: gains[name].value)
    return [
        Finding(
            "survey.reinforcement",
            f"the least share of the possible gain is {least}'s, {gains[least]}",
            all_of([above(gain, m.settings.seeds) for gain in gains.values()]),
            f"40 completions of up to {LENGTH} tokens, {enough(m.settings.seeds, 'world')}",
            "The gain is that of reward less beta times the divergence, of 1 at the optimum.",
        )
    ]


def tables(m: Measured) -> list[Table]:
    """Ends, spreads and fixed points."""
    return [
        Table(
            "After the last step",
            ["objective", "KL(pi | pi*), nats", "share of the possible gain"],
            [[name, f"{m.end(name)}", f"{m.gain(name)}"] for name in NAMES],
            "Mean over worlds with Student's interval. "
            f"At the start: {mean([gaps[0] for gaps in m.gaps[EXACT]])} nats.",
        ),
        Table(
            "The gradient of two completions, at the start",
            ["objective", "variance", "cosine"],
            [[name, f"{v:.3g}", f"{c:.4f}"] for name, (v, c) in m.spreads.items()],
            "The variance over the square of its mean, and the cosine between the mean and the "
            "gradient of J, by the sum over all 1,600 pairs, in the first world.",
        ),
        Table(
            "Where GRPO ends",
            ["GRPO", "fixed point from pi*", "learned from pi*", "learned from fixed point"],
            [
                [
                    name,
                    *(
                        f"{mean(m.ends[name][key])}"
                        for key in (
                            "from_optimum",
                            "learned_from_optimum",
                            "learned_from_fixed_point",
                        )
                    ),
                ]
                for name in GRPO
            ],
            "KL in nats, mean over worlds. The largest number of the mean gradient at a fixed "
            f"point is {max(max(m.ends[name]['gradient_left']) for name in GRPO):.1g}.",
        ),
    ]


# --- figures ------------------------------------------------------------------------------------

STYLES = dict(zip(TOWARDS, (FULL, FROZEN, *OTHERS), strict=False))


def draw(m: Measured, figures: Figures) -> None:
    """The way to pi*, and where GRPO ends."""
    with figures.add(
        "optimum.png", "KL(pi | pi*) against the step, mean over worlds.", height=4.4
    ) as axes:
        for name in TOWARDS:
            curve = [sum(gaps) / len(gaps) for gaps in zip(*m.gaps[name], strict=True)]
            axes.plot(m.steps, curve, label=name, **line(STYLES[name]))
        axes.set(xlabel="step", ylabel="KL(pi | pi*) (nats)", yscale="log")
        axes.legend()
    with figures.add(
        "grpo.png",
        "Where GRPO ends, mean over worlds: how far its own fixed point is from pi*, and what it "
        "learned from both.",
        height=3.6,
    ) as axes:
        keys = {
            "from_optimum": "fixed point from pi*",
            "learned_from_optimum": "learned from pi*",
            "learned_from_fixed_point": "learned from fixed point",
        }
        for i, ((key, label), style) in enumerate(zip(keys.items(), OTHERS, strict=False)):
            heights = [mean(m.ends[name][key]).value for name in GRPO]
            places = [place + 0.26 * (i - 1) for place in range(len(GRPO))]
            axes.bar(places, heights, 0.24, label=label, color=style["color"], edgecolor="black")
        axes.set_xticks(range(len(GRPO)), GRPO)
        axes.set(ylabel="KL (nats)")
        axes.legend()
