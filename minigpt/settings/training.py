"""The settings of training that every training command has, with their help texts."""

from dataclasses import dataclass, fields

from minigpt.models.config import positive
from minigpt.settings.checks import check_heldout, check_seed
from minigpt.settings.options import option
from minigpt.training.schedule import SCHEDULES
from minigpt.training.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.  A command inherits them and changes defaults with `with_default`."""

    steps: int = option("updates", 200)
    batch_size: int = option("windows in a batch", 8)
    sequence_length: int = option("tokens in a window", 128)
    lr: float | None = option("peak rate", None)
    schedule: str = option("course of the rate after warm-up", "linear", choices=SCHEDULES)
    warmup_steps: int = option("updates of warm-up", 0)
    schedule_steps: int | None = option("length of the schedule (default: steps)", None)
    weight_decay: float = option("AdamW's", 0.01)
    max_norm: float = option("clip the gradient norm to this", 1.0)
    accumulate: int = option("batches in an update", 1)
    bf16: bool = option("compute in bfloat16 where it is safe", False)
    heldout: float = option("share of each text, at its end, held out for evaluation", 0.1)
    evaluate_every: int = option("steps between two held-out losses", 50)
    snapshot_every: int = option("steps between two snapshots to resume from", 50)
    seed: int = option("seed of all random numbers", 0)

    def config(self, lr: float) -> TrainConfig:
        """What the training loop is told, with peak rate `lr`.

        Raises:
            ValueError: any of these settings is outside its range.
        """
        check_heldout(self.heldout)
        positive(self, "batch_size", "sequence_length")
        check_seed(self.seed)
        shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(TrainingOptions)}
        return TrainConfig(**{name: getattr(self, name) for name in shared} | {"lr": lr})

    @property
    def tokens_a_step(self) -> int:
        """Tokens that one update reads."""
        return self.batch_size * self.sequence_length * self.accumulate
