"""The device of a command: `--device`."""

from dataclasses import dataclass

import torch

from minigpt.settings.options import option
from minigpt.training.processes import local_rank, started


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Where the model runs."""

    device: str = option('"auto": the GPU where there is one, else the CPU; "cpu", "cuda"', "auto")

    def find_device(self) -> torch.device:
        """The device; a GPU becomes the current one, and from here on its memory is counted.

        Raises:
            ValueError: this machine has no such device.
        """
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ["cpu", *(["cuda"] if gpus else []), *gpus]
        name = here[min(1, len(gpus))] if self.device == "auto" else self.device
        if name == "cuda" and (started() or 1) > 1:  # each process has one of its own
            if local_rank() >= len(gpus):
                raise ValueError(
                    f"process {local_rank()} of this machine has no GPU, there are {len(gpus)}: "
                    "start fewer processes, or give --device cpu"
                )
            name = gpus[local_rank()]
        if name not in here:
            raise ValueError(
                f"--device is {name!r}, must be auto or what this machine has: {', '.join(here)}"
            )
        if name != "cpu":
            torch.cuda.init()
            torch.cuda.set_device(name)
        return torch.device(name)
