"""From host to device without waiting, and what may happen in the capture of a CUDA graph."""

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it, as pinned memory allows."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def outside_capture(device: torch.device) -> None:
    """Refuses, within a capture, what every replay would then do again.

    Raises:
        ValueError: a CUDA graph is being captured.
    """
    if capturing(device):
        raise ValueError(
            "settings or state are new in this capture of a CUDA graph: "
            "make a step, or call write_settings(), before it"
        )
