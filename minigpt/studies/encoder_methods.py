"""The methods of `peft_lite` on an encoder with a classifier, and their rates.

Every method trains the classifier too, and the pooler where the checkpoint lacks one (after masked
language modelling): they start at random, and nothing could be learned through them.  Two more
stand beside the methods: full tuning, and `classifier`, where these modules train alone.
"""

from collections.abc import Sequence

import peft_lite
from minigpt.models.architecture import Model
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions

FULL, FLOOR = "full", "classifier"
# the methods of the published study; a new method does not join it by itself
METHODS = (
    *(FULL, "freeze", "bias", "lora", "dora", "ia3", "bottleneck", "prefix", "prompt"),
    FLOOR,
)
# peak rates for the bundled encoder.  Of full, freeze, lora, dora and bottleneck each is the best
# of three, the others learn next to nothing at any of them: docs/studies/peft_rates.csv
LR = {
    "full": 1e-3,
    "freeze": 1e-3,
    "bias": 1e-2,
    "lora": 5e-3,
    "dora": 5e-3,
    "ia3": 2e-2,
    "bottleneck": 3e-3,
    "prefix": 1e-2,
    "prompt": 3e-2,
    "classifier": 1e-2,
}


def attach(model: Model, method: str, new: Sequence[str]) -> peft_lite.Handle | None:
    """Puts a method with the command's defaults on the model; None for full tuning.

    Args:
        new: modules that train whole under each method.
    """
    if method == FLOOR:
        return peft_lite.attach(model, peft_lite.FreezeConfig(train=new))
    return methods.attach(model, MethodOptions(method=method), new)
