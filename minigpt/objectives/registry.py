"""The objectives of `minigpt pretrain`, by name."""

from minigpt.objectives import causal, masked
from minigpt.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "clm": causal.CLM,
    "mlm": masked.MLM,
}
