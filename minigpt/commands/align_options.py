"""The settings of `minigpt align`: those of tuning, and those that belong to some objectives."""

import math
from dataclasses import dataclass, replace
from typing import Self

from minigpt.checkpoints.source import FORMS
from minigpt.commands.tuning import TuningOptions
from minigpt.models.config import one_of
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options, Reinforcement
from minigpt.settings.options import option

PREFERENCES = {
    "reward": "a classifier of one output scores what is preferred higher (an encoder)",
    "dpo": "the policy itself tells what is preferred",
}
OBJECTIVES = {**PREFERENCES, **{name: r.about for name, r in REINFORCEMENTS.items()}}
RATES = {"reward": 1e-4, "dpo": 1e-6, **{name: r.lr for name, r in REINFORCEMENTS.items()}}
BETA = 0.1  # of DPO
POLICIES = tuple(REINFORCEMENTS)
# the objectives that an option belongs to
OWNERS = {
    "beta": ("dpo", *POLICIES),
    "max_new_tokens": ("dpo", *POLICIES),
    "chat": ("dpo", *POLICIES),
    "reward": POLICIES,
    "kl": POLICIES,
    "iterations": POLICIES,
    "generations": ("rloo", "grpo"),
    "clip": ("rloo", "grpo", "ppo"),
    "scale": ("grpo",),
    "average": ("grpo",),
    "baseline": ("reinforce",),
}
NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Align(TuningOptions):
    """The command's settings."""

    model: str = option(f"a model: {FORMS}; for the objective reward an encoder")
    data: str = option(
        "rows of preferences or prompts: .jsonl, .json or .csv, perhaps .gz, or bundled-carroll"
    )
    objective: str = option(
        "; ".join(f"{name}: {about}" for name, about in OBJECTIVES.items()),
        choices=tuple(OBJECTIVES),
    )
    lr: float | None = option(
        "peak rate (default: by objective, "
        + ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
        + ")",
        None,
    )
    reward: str | None = option(
        "what a completion gets: length:N, regex:PATTERN, exact, rouge-l:FIELD, model:FOLDER of a "
        "run of the objective reward, or module:function",
        None,
    )
    beta: float | None = option(
        f"factor of the divergence from the model before (default: dpo {BETA}, "
        + ", ".join(f"{name} {r.beta:g}" for name, r in REINFORCEMENTS.items())
        + ")",
        None,
    )
    kl: str | None = option(
        "k1: it is part of the reward; k3: of the loss (default: k3 for grpo, else k1)",
        None,
        choices=("k1", "k3"),
    )
    generations: int | None = option("rloo, grpo: completions of a prompt (default: 2, 8)", None)
    iterations: int | None = option("updates on the same completions (default: 1, ppo 4)", None)
    clip: float | None = option("rloo, grpo, ppo: bound of the ratio (default: 0.2)", None)
    scale: str | None = option(
        "grpo: advantages over a group's standard deviation, or none (default: group)",
        None,
        choices=("group", "none"),
    )
    average: str | None = option(
        "grpo: tokens count alike, or sequences (default: token)",
        None,
        choices=("token", "sequence"),
    )
    baseline: str | None = option(
        "reinforce: mean of the other rewards, or none (default: others)",
        None,
        choices=("others", "none"),
    )
    max_new_tokens: int | None = option(f"of a completion, at most (default: {NEW_TOKENS})", None)
    chat: bool = option("a prompt that is a text is a user's message", False)
    batch_size: int = option("pairs, or completions, in a batch", 8)
    sequence_length: int = option("tokens of a row; rows that are longer are left out", 128)
    heldout: float = option("share of the rows that is held out, at random", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "objective", OBJECTIVES)
        for name, owners in OWNERS.items():
            given = getattr(self, name)
            if given is not None and given is not False and self.objective not in owners:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} belongs to --objective {' or '.join(owners)}, not {self.objective}"
                )
        if getattr(self, "lora_dropout", None):
            raise ValueError("--lora-dropout: preferences and rewards are learned without dropout")
        if self.objective in POLICIES and self.bf16:
            raise ValueError(
                "--bf16: log-probabilities of sampling and training would differ by its rounding"
            )
        if self.objective in POLICIES and self.reward is None:
            raise ValueError(f"--objective {self.objective} needs --reward")
        if self.objective in POLICIES:
            self._check_round()
        for name in ("beta", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name} is {value}, must not be negative")
        for name in ("generations", "iterations", "max_new_tokens"):
            least, value = 2 if name == "generations" else 1, getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {value}, must be at least {least}")
        if self.objective != "reward" and self.sequence_length <= self.new_tokens:
            raise ValueError(
                f"--sequence-length is {self.sequence_length}, must be above --max-new-tokens, "
                f"which is {self.new_tokens}: a prompt needs room, too"
            )

    def _check_round(self) -> None:
        """Raises ValueError where a group would be cut, or a completion would stand alone."""
        G = self.generations or REINFORCEMENTS[self.objective].generations
        if self.batch_size % G:
            raise ValueError(
                f"--batch-size is {self.batch_size}, must be a multiple of --generations, which is "
                f"{G}: the completions of a prompt stand in one batch"
            )
        alone = self.batch_size * self.accumulate == 1
        if self.objective == "reinforce" and self.baseline != "none" and alone:
            raise ValueError("--batch-size is 1: --baseline others needs others in a round")

    def with_rate(self) -> Self:
        """The settings with the objective's rate where none is given."""
        return replace(self, lr=RATES[self.objective] if self.lr is None else self.lr)

    @property
    def new_tokens(self) -> int:
        """Tokens of a completion, at most."""
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    @property
    def updates(self) -> int:
        """Updates on the same completions."""
        given = self.iterations
        return REINFORCEMENTS[self.objective].iterations if given is None else given

    def options(self, objective: Reinforcement) -> Options:
        """How the objective treats a round."""
        return Options(
            beta=objective.beta if self.beta is None else self.beta,
            kl=self.kl or objective.kl,
            generations=self.generations or objective.generations,
            clip=0.2 if self.clip is None else self.clip,
            scaled=self.scale != "none",
            average=self.average or "token",
            baseline=self.baseline != "none",
        )
