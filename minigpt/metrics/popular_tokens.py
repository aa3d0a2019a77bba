"""The k most frequent tokens of a text, and their share in another.

p = share of tokens that are among the k most frequent ones
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from minigpt.metrics.intervals import Estimate, share


def popular_tokens(
    ids: Iterable[int], k: int, allowed: Callable[[int], bool] = lambda token: True
) -> set[int]:
    """The k most frequent token ids of a text among the allowed ones; of equally frequent ones
    those that occur first.

    Raises:
        ValueError: k is not positive, or the text has fewer than k different allowed tokens.
    """
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    counts = Counter(ids)
    popular = [token for token, _ in counts.most_common() if allowed(token)][:k]
    if len(popular) < k:
        raise ValueError(f"k is {k}, the text has {len(popular)} different allowed tokens")
    return set(popular)


def longer_than(characters: int, decode: Callable[[list[int]], str]) -> Callable[[int], bool]:
    """For `popular_tokens`: only tokens whose decoded text has more than so many characters."""
    return lambda token: len(decode([token])) > characters


def popular_share(ids: Sequence[int], popular: Collection[int]) -> Estimate:
    """The share of `ids` that are popular, with Wilson's interval."""
    return share(sum(token in popular for token in ids), len(ids))
