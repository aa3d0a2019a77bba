"""What may happen while a CUDA graph is being captured."""

import torch


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
