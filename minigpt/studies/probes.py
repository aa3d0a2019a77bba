"""What the studies measure in each step of a run (minigpt/training/train.py calls them)."""

from torch import Tensor, nn

from minigpt.training.train import Row


class GradientNorms:
    """Norms of some gradients before clipping: `name` -> |g|, as `gradient_norm.name`.

    Frozen ones have none.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def before(self) -> Row:
        return {
            f"gradient_norm.{name}": p.grad.norm().item()
            for name, p in self.parameters.items()
            if p.grad is not None
        }

    def after(self) -> Row:
        return {}


class WeightChange:
    """How far an update moves a weight: the Frobenius norm of W_t - W_(t-1), as `weight_change`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.old: Tensor | None = None

    def before(self) -> Row:
        self.old = self.weight.detach().clone()
        return {}

    def after(self) -> Row:
        assert self.old is not None
        return {"weight_change": (self.weight.detach() - self.old).norm().item()}
