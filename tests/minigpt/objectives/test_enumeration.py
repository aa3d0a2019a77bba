"""Estimators of the policy gradient against the exact gradient, by sums over all completions.

Nothing is drawn: the mean of an estimator is the sum over all groups of completions, each weighted
by its probability.
"""

import math

import pytest
import torch
from torch import Tensor

from minigpt.objectives import advantages, policy
from minigpt.objectives.preference import bradley_terry, dpo_scores
from tests.minigpt.objectives.enumeration import World, completions, mean_gradient, world

BETA = 0.7


@pytest.fixture(scope="module")
def w() -> World:
    return world()


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def in_reward(w: World, group: Tensor, old: Tensor) -> Tensor:
    """R - beta sum_t k1, (G,)."""
    return w.rewards[group] - w.beta * policy.k1(old, w.reference[group]).sum(1)


def mean(losses: Tensor, w: World, group: Tensor, by: str) -> Tensor:
    real = w.real[group]
    return policy.weighted_mean(losses, policy.token_weights(real, by), int(real.sum()))


def test_all_completions_are_there(w: World) -> None:
    assert len(completions()) == 1 + 3 + 9 + 27
    assert float(w.logprobs().detach().sum(1).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(w.reference.sum(1).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert w.real.sum(1).tolist() == [len(row) for row in completions()]


def test_the_optimum_is_the_reference_tilted_by_the_reward(w: World) -> None:
    z = w.optimum().detach().requires_grad_()
    (d,) = torch.autograd.grad(w.objective(z.log_softmax(0)), z)
    assert float(d.abs().max()) < 1e-14
    best = w.objective(w.optimum())
    random = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0):
        away = w.optimum() + size * torch.randn(len(z), generator=random, dtype=torch.float64)
        assert w.objective(away.log_softmax(0)) < best


@pytest.mark.parametrize("baseline", [0.0, 1.7, -30.0])
def test_reinforce_is_unbiased_with_any_constant_baseline(w: World, baseline: float) -> None:
    def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
        A = in_reward(w, group, old)[:, None] - baseline
        return mean(policy.reinforce(logprobs, A), w, group, "sum")

    assert same(mean_gradient(w, 1, loss), -w.exact(), 1e-9)


def test_the_mean_over_tokens_is_not_the_policy_gradient(w: World) -> None:
    """By token or by completion, a short completion counts more than its probability."""
    for by in ("token", "sequence"):

        def loss(group: Tensor, logprobs: Tensor, old: Tensor, by: str = by) -> Tensor:
            A = in_reward(w, group, old)[:, None]
            return mean(policy.reinforce(logprobs, A), w, group, by)

        assert cosine(mean_gradient(w, 1, loss), -w.exact()) < 0.999


def test_rloo_is_unbiased(w: World) -> None:
    def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
        A = advantages.leave_one_out(in_reward(w, group, old)[None])[0]
        return policy.clipped_surrogate(logprobs.sum(1) - old.sum(1), A).mean()

    assert same(mean_gradient(w, 2, loss), -w.exact())


@pytest.mark.parametrize("G", [2])
def test_the_groups_mean_shrinks_the_gradient(w: World, G: int) -> None:
    """Its mean contains the completion itself: 1 - 1/G of the gradient is left."""

    def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
        A = advantages.group_relative(in_reward(w, group, old)[None], scaled=False)[0]
        return mean(policy.clipped_surrogate(logprobs - old, A[:, None]), w, group, "sum")

    assert same(mean_gradient(w, G, loss), -(1 - 1 / G) * w.exact())


def test_grpo_divided_by_the_deviation_follows_another_gradient(w: World) -> None:
    """Of two completions only the order of the rewards is left: A = +-1/sqrt 2."""
    rewards = (2 * w.rewards).exp()  # far apart at the top

    def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
        A = advantages.group_relative(rewards[group][None], scaled=True)[0]
        return mean(policy.clipped_surrogate(logprobs - old, A[:, None]), w, group, "sum")

    measured = -mean_gradient(w, 2, loss)
    # mean over y' of A(y, y') = (P(r' < r) - P(r' > r)) / sqrt 2, but for the 1e-4
    log_pi = w.logprobs().sum(1)
    pi = log_pi.detach().exp()
    order = torch.sign(rewards[:, None] - rewards[None])
    assert same(measured, w.gradient((pi * (order @ pi) * log_pi).sum()) / math.sqrt(2), 5e-3)
    assert cosine(measured, w.gradient((w.logprobs().sum(1).exp() * rewards).sum())) < 0.9


def test_ppo_takes_the_exact_gradient_in_its_first_step(w: World) -> None:
    """Rewards of tokens, any values, lambda 1, nothing whitened: V is a baseline of each state.

    With lambda 1 the advantage of a token is what comes after it, less V.
    """
    random = torch.Generator().manual_seed(3)
    table = torch.randn(4**3, generator=random, dtype=torch.float64)  # V of each prefix

    def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
        real, ids = w.real[group], w.completion[group].clamp(min=0)
        values = table[prefixes(ids)]
        rewards = -w.beta * policy.k1(old, w.reference[group])
        rewards = rewards + advantages.score_at_end(w.rewards[group], real)
        A = advantages.generalized_advantages(rewards, values, real, lam=1.0)
        return mean(policy.clipped_surrogate(logprobs - old, A), w, group, "sum")

    assert same(mean_gradient(w, 1, loss), -w.exact(), 1e-9)


def test_ppo_with_exact_values_is_exact_at_every_lambda(w: World) -> None:
    values = exact_values(w)
    for lam in (0.0, 0.5, 0.95):

        def loss(group: Tensor, logprobs: Tensor, old: Tensor, lam: float = lam) -> Tensor:
            real = w.real[group]
            rewards = -w.beta * policy.k1(old, w.reference[group])
            rewards = rewards + advantages.score_at_end(w.rewards[group], real)
            A = advantages.generalized_advantages(rewards, values[group], real, lam=lam)
            return mean(policy.clipped_surrogate(logprobs - old, A), w, group, "sum")

        assert same(mean_gradient(w, 1, loss), -w.exact())


def test_wrong_values_bias_a_lambda_below_one_and_whitening_too(w: World) -> None:
    values = torch.ones_like(w.real) * torch.tensor([2.0, -1.0, 0.5])

    def loss(group: Tensor, logprobs: Tensor, old: Tensor, lam: float, white: bool) -> Tensor:
        real = w.real[group]
        rewards = -w.beta * policy.k1(old, w.reference[group])
        rewards = rewards + advantages.score_at_end(w.rewards[group], real)
        A = advantages.generalized_advantages(rewards, values[group], real, lam=lam)
        if white:
            A = advantages.whiten(A, real)
        return mean(policy.clipped_surrogate(logprobs - old, A), w, group, "sum")

    assert same(mean_gradient(w, 2, lambda *a: loss(*a, lam=1.0, white=False)), -w.exact(), 1e-9)
    biased = mean_gradient(w, 2, lambda *a: loss(*a, lam=0.5, white=False))
    assert cosine(biased, -w.exact()) < 0.999
    whitened = mean_gradient(w, 2, lambda *a: loss(*a, lam=1.0, white=True))
    assert cosine(whitened, -w.exact()) < 0.99


def test_both_estimators_have_the_mean_of_the_divergence(w: World) -> None:
    logprobs = w.logprobs().detach()
    pi = logprobs.sum(1).exp()
    exact = (pi * (logprobs - w.reference).sum(1)).sum()
    for k in (policy.k1, policy.k3):
        assert float((pi * k(logprobs, w.reference).sum(1)).sum()) == pytest.approx(float(exact))
    assert float(policy.k3(logprobs, w.reference).min()) >= 0
    assert float(policy.k1(logprobs, w.reference).min()) < 0


def test_in_a_loss_k1_teaches_nothing_and_k3_the_other_divergence(w: World) -> None:
    def of(k: object) -> Tensor:
        def loss(group: Tensor, logprobs: Tensor, old: Tensor) -> Tensor:
            return mean(k(logprobs, w.reference[group]), w, group, "sum")  # type: ignore[operator]

        return mean_gradient(w, 1, loss)

    logprobs = w.logprobs()
    exact = w.gradient((logprobs.sum(1).exp() * (logprobs.sum(1) - w.reference.sum(1))).sum())
    assert float(of(policy.k1).abs().max()) < 1e-12 * float(exact.abs().max())
    # - sum over states that pi visits of sum_v pi_ref(v) log pi(v)
    assert same(of(policy.k3), w.gradient(other_divergence(w)))
    assert not same(of(policy.k3), exact, 0.1)


def test_dpos_minimum_over_all_pairs_is_the_optimum(w: World) -> None:
    i, j = torch.meshgrid(torch.arange(len(w.rewards)), torch.arange(len(w.rewards)), indexing="ij")
    i, j = i.flatten(), j.flatten()
    # P(i preferred to j) = sigma(r_i - r_j); pairs are asked about by any law
    random = torch.Generator().manual_seed(5)
    asked = torch.rand(len(w.rewards), len(w.rewards), generator=random, dtype=torch.float64)
    weights = torch.sigmoid(w.rewards[i] - w.rewards[j]) * (asked + asked.T).flatten()

    def loss(log_pi: Tensor) -> Tensor:
        scores = dpo_scores(log_pi, w.reference.sum(1), w.beta)
        pairs = torch.stack([scores[i], scores[j]], 1)
        nats = -pairs.log_softmax(1)[:, 0]
        return (weights * nats).sum() / weights.sum()

    z = w.optimum().detach().requires_grad_()
    (d,) = torch.autograd.grad(loss(z.log_softmax(0)), z)
    assert float(d.abs().max()) < 1e-14
    start = w.reference.sum(1).detach().requires_grad_()
    assert float(loss(start).detach()) == pytest.approx(math.log(2))
    (d,) = torch.autograd.grad(loss(start.log_softmax(0)), start)
    assert float(d.abs().max()) > 1e-4


def test_the_loss_of_pairs_is_bradley_and_terrys() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 2, generator=random, dtype=torch.float64)
    preferred = torch.randint(2, (9,), generator=random)
    expected = [
        math.log1p(math.exp(row[1 - p] - row[p]))
        for row, p in zip(scores.tolist(), preferred.tolist(), strict=True)
    ]
    assert float(bradley_terry(scores, preferred)) == pytest.approx(sum(expected) / 9)


def prefixes(ids: Tensor) -> Tensor:
    """A number for the tokens before each token, (B, C)."""
    before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
    place = torch.tensor([1, 4, 16])
    return (before * place).cumsum(1)


def exact_values(w: World) -> Tensor:
    """V of the state before each token, (N, C): the mean of what comes after it."""
    logprobs = w.logprobs().detach()
    pi = logprobs.sum(1).exp()
    last = w.real.sum(1).long() - 1
    rewards = -w.beta * (logprobs - w.reference)
    rewards[torch.arange(len(pi)), last] += w.rewards
    after = rewards.flip(1).cumsum(1).flip(1)
    number = prefixes(w.completion.clamp(min=0))
    values = torch.zeros_like(after)
    for t in range(after.size(1)):
        for key in number[:, t].unique():
            rows = (number[:, t] == key) & (w.real[:, t] > 0)
            if rows.any():
                values[rows, t] = (pi[rows] * after[rows, t]).sum() / pi[rows].sum()
    return values


def other_divergence(w: World) -> Tensor:
    """Sum over prefixes s of pi(s) (fixed) KL(pi_ref(. | s) | pi(. | s)), without its constant."""
    logprobs = w.logprobs()
    pi, ref = logprobs.detach().sum(1).exp(), w.reference
    number = prefixes(w.completion.clamp(min=0))
    total = torch.zeros((), dtype=torch.float64)
    for t in range(logprobs.size(1)):
        for key in number[:, t].unique():
            rows = (number[:, t] == key) & (w.real[:, t] > 0)
            visited = pi[rows].sum()
            tokens: dict[int, int] = {}
            for row in rows.nonzero()[:, 0].tolist():
                tokens.setdefault(int(w.completion[row, t]), row)
            for row in tokens.values():
                total = total - visited * ref[row, t].exp() * logprobs[row, t]
    return total
