"""Training or evaluation mode for the time of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_locks: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()  # one for each model
_adding = Lock()


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets all modules of `model` to one mode, and each back to its earlier mode at the end.

    A model has one mode for all threads.  So a thread that wants to set it waits until every other
    has left its block; within a thread blocks may nest.
    """
    with _adding:
        lock = _locks.setdefault(model, RLock())
    with lock:
        before = [(module, module.training) for module in model.modules()]
        model.train(training)
        try:
            yield
        finally:
            for module, was_training in before:
                module.training = was_training
