"""What follows from the runs of partial freezing for each seed or round
(minigpt/studies/partial_freezing.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from minigpt.metrics.intervals import Estimate, share
from minigpt.studies.lab import Result
from minigpt.studies.partial_freezing import RULES, TEXTS, Settings


@dataclass(frozen=True)
class Measured:
    """The parts' results, and what follows from them for each seed or round."""

    settings: Settings
    parts: Mapping[str, Result]

    def runs(self, arm: str, own: str) -> list[Result]:
        """One result a seed."""
        return [self.parts[f"{arm}-{own}-{seed}"] for seed in range(self.settings.seeds)]

    def tuned(self) -> list[tuple[str, str]]:
        """Rules and texts that there are runs of."""
        return [(arm, own) for own in TEXTS for arm in RULES if f"{arm}-{own}-0" in self.parts]

    def memory(self, field: str, arm: str) -> list[int]:
        """Bytes, one figure a seed."""
        return [self.parts[f"memory-{arm}-{seed}"][field] for seed in range(self.settings.seeds)]

    def relative_memory(self, arm: str) -> list[float]:
        """Peak over full tuning's."""
        pairs = zip(self.memory("peak", arm), self.memory("peak", "full"), strict=True)
        return [a / b for a, b in pairs]

    def relative_time(self, arm: str) -> list[float]:
        """Of a step, one ratio a round."""
        seconds = self.parts["time"]["seconds"]
        return [a / b for a, b in zip(seconds[arm], seconds["full"], strict=True)]

    def inference(self) -> list[float]:
        """Tuned over untouched, one ratio a round."""
        seconds = self.parts["inference"]["seconds"]
        return [a / b for a, b in zip(seconds["tuned"], seconds["untouched"], strict=True)]

    def rises(self, arm: str, of: str) -> list[float]:
        """Change of a loss by tuning, one a seed, both models of a rule together; `of` is "own",
        "other" or "pretraining".
        """
        per_text = []
        for own in TEXTS:
            other = TEXTS[1 - TEXTS.index(own)]
            text = {"own": own, "other": other}.get(of, of)
            per_text.append([r["after"]["loss"][text] - r["before"]["loss"][text]
                             for r in self.runs(arm, own)])  # fmt: skip
        return [fmean(both) for both in zip(*per_text, strict=True)]

    def less_forgotten(self) -> list[float]:
        """Nats a token by which full tuning forgets more."""
        pairs = zip(self.rises("full", "pretraining"), self.rises("intended", "pretraining"),
                    strict=True)  # fmt: skip
        return [a - b for a, b in pairs]

    def own_set(self) -> list[float]:
        """How much more a model uses its own text's popular tokens than the other model does."""
        found = []
        for runs in zip(*(self.runs("intended", own) for own in TEXTS), strict=True):
            p = {own: r["after"]["popular"] for own, r in zip(TEXTS, runs, strict=True)}
            first = p["text"]["text"] - p["text2"]["text"]
            second = p["text2"]["text2"] - p["text"]["text2"]
            found.append((first + second) / 2)
        return found

    def frozen_stayed(self) -> bool:
        """Whether no run moved a frozen tensor by a bit, and every one moved all it trains."""
        every = [result for arm, own in self.tuned() for result in self.runs(arm, own)]
        return all(
            r["frozen_to_the_bit"] and not r["frozen_moved"] and r["trained_moved"] > 0
            for r in every
        )


Shares = Mapping[str, Mapping[str, Mapping[str, Estimate]]]


def popularity(found: Measured) -> Shares:
    """Set -> text tuned on -> before, after: the sampled tokens of all seeds taken together."""
    n = found.settings.starts * found.settings.tokens

    def p(own: str, when: str, chosen: str) -> Estimate:
        values = [result[when]["popular"][chosen] for result in found.runs("intended", own)]
        return share(round(sum(values) * n), n * len(values))

    return {
        chosen: {own: {when: p(own, when, chosen) for when in ("before", "after")} for own in TEXTS}
        for chosen in TEXTS
    }
