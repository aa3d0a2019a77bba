"""All completions of a small vocabulary, for the tests of preferences and policy gradients: the
exact objective, its exact gradient and its exact optimum, by sums over all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from minigpt import GPTNeo
from minigpt.objectives.logprobs import completion_logprobs
from tests import tiny

V, STEPS, END = 4, 3, 0
IGNORED = -100


def completions() -> list[list[int]]:
    """Every completion: those that end with END, and those that are cut after STEPS tokens."""
    inner = range(1, V)
    ended = [[*head, END] for n in range(STEPS) for head in product(inner, repeat=n)]
    return [*ended, *map(list, product(inner, repeat=STEPS))]


@dataclass
class World:
    """A policy, its reference, a reward, and all completions of the prompt (1, 2).

    Attributes:
        ids, mask: rows (N, T) of prompt and completion.
        completion: (N, C), -100 after the end.
        rewards: (N,).
        reference: log pi_ref of each token, (N, C).
    """

    policy: GPTNeo
    ids: Tensor
    mask: Tensor
    completion: Tensor
    rewards: Tensor
    reference: Tensor
    beta: float = 0.7

    @property
    def real(self) -> Tensor:
        return (self.completion != IGNORED).double()

    def logprobs(self) -> Tensor:
        """Log pi of each token, (N, C), with gradient."""
        return completion_logprobs(self.policy, self.ids, self.mask, self.completion)

    def gradient(self, scalar: Tensor) -> Tensor:
        """D scalar / d theta, all parameters in one row."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        g = torch.autograd.grad(scalar, parameters, allow_unused=True)
        pairs = zip(g, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if d is None else d).flatten() for d, p in pairs])

    def objective(self, log_pi: Tensor) -> Tensor:
        """J = sum_y pi(y) (r(y) - beta log(pi(y) / pi_ref(y))), of log pi(y), (N,)."""
        return (log_pi.exp() * (self.rewards - self.beta * (log_pi - self.reference.sum(1)))).sum()

    def exact(self) -> Tensor:
        """The gradient of J."""
        return self.gradient(self.objective(self.logprobs().sum(1)))

    def optimum(self) -> Tensor:
        """Log pi*, (N,): pi* ~ pi_ref exp(r / beta)."""
        return (self.reference.sum(1) + self.rewards / self.beta).log_softmax(0)


def world(seed: int = 0) -> World:
    """One block in float64, off its initialisation; the reference is another such model."""

    def model(seed: int) -> GPTNeo:
        settings = {"vocab_size": V, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
        return tiny.gpt_neo(seed, max_position_embeddings=8, **settings).double().eval()

    rows = completions()
    completion = torch.tensor([row + [IGNORED] * (STEPS - len(row)) for row in rows])
    prompt = torch.tensor([1, 2]).expand(len(rows), 2)
    ids = torch.cat([prompt, completion.clamp(min=0)], 1)
    mask = torch.cat([torch.ones_like(prompt), (completion != IGNORED).long()], 1)
    with torch.no_grad():
        reference = completion_logprobs(model(seed + 100), ids, mask, completion)
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(rows), generator=random, dtype=torch.float64)
    return World(model(seed), ids, mask, completion, rewards, reference)


def mean_gradient(world: World, G: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of a loss's gradient over all groups of G completions, weighted by their
    probability: sum over groups of prod_i pi(y_i) d loss / d theta.

    Args:
        loss: which completions (G,), their log-probabilities (G, C) and the same detached, those of
            sampling -> scalar.
    """
    whole = world.logprobs()
    leaf = whole.detach().requires_grad_()
    p = leaf.detach().sum(1).exp()
    total = torch.zeros_like(leaf)
    for group in groups(len(p), G):
        value = loss(group, leaf[group], leaf.detach()[group])
        (d,) = torch.autograd.grad(value, leaf)
        total += p[group].prod() * d
    return world.gradient((total * whole).sum())


def groups(N: int, G: int) -> Iterator[Tensor]:
    yield from map(torch.tensor, product(range(N), repeat=G))
