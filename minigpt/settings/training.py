"""The settings that every training command has: those of the loop, and those of its batches."""

from dataclasses import dataclass

from minigpt.models.config import nearest, positive, short
from minigpt.settings.checks import check_heldout, check_installed, check_seed
from minigpt.settings.options import option, with_default
from minigpt.training.trackers.registry import TRACKERS
from minigpt.training.train import TrainConfig

MOST_TOKENS = 2**30  # a step; the largest published runs read some 2^26


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TrainConfig):
    """How to train, and on what.  A command inherits them, and changes defaults by `with_default`.

    Raises:
        ValueError: a setting is outside its range.
    """

    steps: int = with_default(TrainConfig, "steps", 200)
    batch_size: int = option("windows in a batch", 8)
    sequence_length: int = option("tokens in a window", 128)
    heldout: float = option("share of each text, at its end, held out for evaluation", 0.1)
    evaluate_every: int = with_default(TrainConfig, "evaluate_every", 50)
    snapshot_every: int = with_default(TrainConfig, "snapshot_every", 50)
    seed: int = option("seed of all random numbers", 0)
    track: list[str] | None = option(
        "show the metrics in these, too", None, choices=tuple(TRACKERS), free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "sequence_length")
        check_heldout(self.heldout)
        check_seed(self.seed)
        for name in self.track or ():
            if name not in TRACKERS:
                raise ValueError(
                    f"track is {short(name)}, must be one of {', '.join(TRACKERS)}"
                    f"{nearest(name, TRACKERS)}"
                )
            check_installed(name)
        if self.tokens_a_step > MOST_TOKENS:
            raise ValueError(
                f"batch_size, sequence_length and accumulate make {self.tokens_a_step:,} tokens "
                f"a step, must be at most {MOST_TOKENS:,}"
            )

    @property
    def tokens_a_step(self) -> int:
        """Tokens that one update reads."""
        return self.batch_size * self.sequence_length * self.accumulate
