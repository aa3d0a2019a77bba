"""What the parts of the study of ranks say together: tables, three sentences, verdicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean

from minigpt.metrics.intervals import Estimate, mean
from minigpt.studies.claims import SEEDS, Finding, count
from minigpt.studies.counts import lora_counts
from minigpt.studies.lab import Result
from minigpt.studies.report import Table
from minigpt.studies.words import moves

RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (Fraction(1, 16), Fraction(1, 4), Fraction(1))  # of the text's training part
ALL = SHARES[-1]
FULL = "full"
MARGIN = 0.05  # of what fine-tuning gains


@dataclass(frozen=True)
class Size:
    """What was learned from one share of the text.

    Attributes:
        tokens: to train on.
        before: held-out loss before, nats a token.
        full: the same after full tuning, by seed.
        losses: after LoRA, by rank, then by seed.
        trainable: number of parameters, by rank.
        whole: the same of full tuning.
    """

    tokens: int
    before: float
    full: list[float]
    losses: dict[int, list[float]]
    trainable: dict[int, int]
    whole: int

    @property
    def best(self) -> int:
        """The rank of the least mean loss."""
        return min(RANKS, key=lambda r: fmean(self.losses[r]))

    @property
    def gain(self) -> float:
        """What fine-tuning at the best rank takes from the loss."""
        return self.before - fmean(self.losses[self.best])

    def above(self, r: int, other: int) -> Estimate:
        """How much more loss rank r ends with than another, seed by seed."""
        return mean([a - b for a, b in zip(self.losses[r], self.losses[other], strict=True)])

    @property
    def plateau(self) -> int:
        """The smallest rank whose difference to the best has an interval that contains 0."""
        gaps = ((r, self.above(r, self.best)) for r in RANKS)
        return next(r for r, gap in gaps if gap.low <= 0 <= gap.high)


Found = Mapping[Fraction, Size]


def of_text(share: Fraction) -> str:
    """A share in words."""
    return f"{'all' if share == ALL else share} of the text"


def part_name(share: Fraction, seed: int) -> str:
    return f"{share.numerator}-of-{share.denominator}-seed-{seed}"


def collect(results: Mapping[str, Result], seeds: int) -> dict[Fraction, Size]:
    """The parts' results by data size."""
    found = {}
    for share in SHARES:
        runs = [results[part_name(share, seed)] for seed in range(seeds)]
        trainable = runs[0]["trainable"]
        found[share] = Size(
            tokens=runs[0]["tokens"],
            before=runs[0]["before"],
            full=[run["losses"][FULL] for run in runs],
            losses={r: [run["losses"][str(r)] for run in runs] for r in RANKS},
            trainable={r: trainable[str(r)] for r in RANKS},
            whole=trainable[FULL],
        )
    return found


def flat_from(size: Size) -> int | None:
    """The smallest rank that is, with all above it, within MARGIN of the best; None: there is no
    such rank.
    """
    start = None
    for r in reversed(RANKS):
        gap = size.above(r, size.best)
        if max(-gap.low, gap.high) > MARGIN * size.gain:
            break
        start = r
    return start


def reaches(size: Size) -> str:
    """The verdict on the claim that quality reaches a plateau below the largest rank."""
    if len(size.full) < SEEDS or size.gain <= 0:
        return "undecided"
    start = flat_from(size)
    if start is not None and start < RANKS[-1]:
        return "holds"
    last = (size.above(r, size.best) for r in RANKS[-2:])
    return "fails" if any(gap.low > MARGIN * size.gain for gap in last) else "undecided"


def answer(found: Found) -> list[str]:
    """Three sentences."""
    size = found[ALL]
    begins = " and ".join(
        f"at rank {one.plateau} with {share} of it ({one.tokens:,} tokens)"
        for share, one in found.items()
        if share != ALL
    )
    change = size.above(RANKS[-1], RANKS[0])
    return [
        f"With all of the text ({size.tokens:,} tokens) rank {size.best} ends lowest, at "
        f"{mean(size.losses[size.best])} nats a held-out token, after {size.before:.4g} before and "
        f"against {mean(size.full)} of full tuning ({len(size.full)} seeds).",
        f"The plateau, where the difference to the best rank is no longer clear, begins at rank "
        f"{size.plateau}; {begins}.",
        f"From rank {RANKS[0]} to {RANKS[-1]} the trained parameters grow from "
        f"{100 * size.trainable[RANKS[0]] / size.whole:.2g} to "
        f"{100 * size.trainable[RANKS[-1]] / size.whole:.2g} % of full tuning's, and the loss "
        f"{moves(change, ' nats')}; fine-tuning at the best rank gains {size.gain:.4g}.",
    ]


def findings(found: Found, on: str) -> list[Finding]:
    """The verdicts."""
    trained, whole = lora_counts(512, 64, r=8)
    size = found[ALL]
    start = flat_from(size)
    flat = "no rank" if start is None else f"rank {start}"
    others = ", ".join(
        f"{of_text(share)} {reaches(one)}" for share, one in found.items() if share != ALL
    )
    return [
        Finding(
            "rank.count",
            f"{trained:,} against {whole:,}, {100 * (1 - trained / whole):.0f} % fewer",
            "holds" if count(trained, 4_608) == count(whole, 32_768) == "holds" else "fails",
            "a 512 x 64 layer",
        ),
        Finding(
            "rank.plateau",
            f"the difference to rank {size.best}, the best, contains 0 at rank {size.plateau}; "
            f"within 5 % of the gain of fine-tuning from {flat} on",
            reaches(size),
            on,
            f"With all of the text. With less of it: {others}. The scale is alpha / sqrt(r): with "
            "alpha / r larger ranks would be held back.",
        ),
    ]


def tables(found: Found) -> list[Table]:
    """Losses, and differences to the best rank."""
    shares = [of_text(share) for share in found]
    rows = [["before", "0", *(f"{size.before:.4g}" for size in found.values())]]
    for r in RANKS:
        trained = f"{found[ALL].trainable[r]:,}"
        rows.append([f"{r}", trained, *(f"{mean(size.losses[r])}" for size in found.values())])
    rows.append(
        ["full", f"{found[ALL].whole:,}", *(f"{mean(size.full)}" for size in found.values())]
    )
    gaps = [[f"{r}", *(f"{size.above(r, size.best)}" for size in found.values())] for r in RANKS]
    return [
        Table(
            "Held-out loss, nats a token",
            ["rank", "trains", *shares],
            rows,
            "Mean over seeds with Student's interval. Tokens to train on: "
            + ", ".join(f"{of_text(share)} {size.tokens:,}" for share, size in found.items()),
        ),
        Table(
            "Loss above the best rank's, nats a token",
            ["rank", *shares],
            gaps,
            "Seed by seed, mean and interval; the best rank's own is 0.",
        ),
    ]
