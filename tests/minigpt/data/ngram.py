"""An n-gram model over whole numbers, the yardstick for what a network learns beyond counting.

Interpolated modified Kneser-Ney: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques
for Language Modeling", https://dash.harvard.edu/handle/1/25104739.  With h a context, h' the same
without its first symbol and V the number of symbols,

    p(w | h) = (c(hw) - D(c(hw))) / c(h.)  +  gamma(h) p(w | h')        and at last 1/V
    c(h.)    = sum_w c(hw),    gamma(h) = sum_w D(c(hw)) / c(h.)
    D(i)     = i - (i + 1) Y n_{i+1} / n_i  for i = 1, 2, 3,    Y = n_1 / (n_1 + 2 n_2)
    D(0)     = 0,    D(i) = D(3) for i > 3

c counts occurrences at the highest order; below it, c(g) is the number of different symbols that
occur before g.  n_i is the number of k-grams with c = i; every order k has its own.

A k-gram is known by its place in the sorted table of all k-grams; its key there is the place of its
first k-1 symbols times V, plus its last symbol.  So every order is one np.unique or one lookup.
"""

import numpy as np

FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # D where the counts of counts give none, as KenLM's


class NGram:
    """Counts of `tokens` (n,), each in 0, ..., vocab_size - 1, and what they predict."""

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.keys: list[np.ndarray] = []  # of each order: the sorted keys of its k-grams
        self.shares: list[np.ndarray] = []  # of each k-gram hw: (c(hw) - D(c(hw))) / c(h.)
        self.gammas: list[np.ndarray] = []  # of each context h: gamma(h)
        tokens = np.asarray(tokens, np.int64)
        places = [np.zeros(len(tokens) + 1, np.int64)]  # of the k-gram that ends before position i
        counts = []
        for k in range(1, order + 1):
            keys = places[-1][:-1][k - 1 :] * vocab_size + tokens[k - 1 :]
            unique, inverse, count = np.unique(keys, return_inverse=True, return_counts=True)
            places.append(np.concatenate([np.full(k, -1), inverse]))
            self.keys.append(unique)
            counts.append(count)
        for k in range(1, order):  # an occurrence counts once for each symbol that stands before it
            ends = np.unique(places[k + 1][k + 1 :], return_index=True)[1] + k + 1
            counts[k - 1] = np.bincount(places[k][ends], minlength=len(self.keys[k - 1]))
        contexts = 1  # the empty one
        for keys, count in zip(self.keys, counts, strict=True):
            discount = discounts(count)[count.clip(max=3)]
            context = keys // vocab_size
            total = np.bincount(context, count, contexts)
            unused = total == 0  # ends the text, so that nothing follows it
            self.shares.append((count - discount) / (total + unused)[context])
            self.gammas.append(np.bincount(context, discount, contexts) / (total + unused) + unused)
            contexts = len(keys)

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p(token | the order - 1 tokens before it, or as many as there are), for tokens (n,)."""
        tokens = np.asarray(tokens, np.int64)
        p = np.full(len(tokens), 1 / self.vocab_size)
        context = np.zeros(len(tokens), np.int64)  # place of the k-1 symbols before, -1: never seen
        for keys, shares, gammas in zip(self.keys, self.shares, self.gammas, strict=True):
            known = context >= 0
            wanted = context * self.vocab_size + tokens
            place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            seen = known & (keys[place] == wanted)
            p = np.where(known, gammas[context] * p + np.where(seen, shares[place], 0), p)
            context = np.concatenate([[-1], np.where(seen, place, -1)[:-1]])
        return p

    def bits(self, tokens: np.ndarray) -> float:
        """What all of `tokens` but the first cost to predict, in bits."""
        return float(-np.log2(self.probabilities(tokens)[1:]).sum())


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D(1), D(2), D(3 and beyond), from the counts of the k-grams of one order."""
    n = np.bincount(counts.clip(max=5), minlength=6)
    if (n[1:5] == 0).any():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    d = np.array([0.0, *(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))])
    return d if (d[1:] > 0).all() else FALLBACK
