"""Checks of settings that more than one command has."""

from importlib.util import find_spec


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that a random generator does not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}, must lie in [0, 2^63)")


def check_heldout(share: float) -> None:
    """Raises ValueError for a held-out share that leaves one of the two parts empty."""
    if not 0 < share < 1:
        raise ValueError(f"--heldout is {share}, must lie between 0 and 1")


def check_installed(*libraries: str) -> None:
    """Raises ValueError for libraries that pip installs on demand, before any work is done."""
    missing = " ".join(name for name in libraries if find_spec(name) is None)
    if missing:
        raise ValueError(f"not installed: {missing}; run: pip install {missing}")
