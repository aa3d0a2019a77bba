"""Multi-head attention.  Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    attention(Q, K, V) = softmax(scale Q K^T) V          for each head, over the visible keys

Shapes:  B batch   T time (queries)   S slots (keys: the cache's, then the T new ones)
         D width   H heads            N width of a head, D = H N
         G heads of keys and values: as many, or fewer, each for H / G heads of queries
         (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.models.linear import Linear
from minigpt.models.slots import NoPrefix


def visible(
    queries: int,
    slots: int,
    window: int | None = None,
    padding: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The causal mask (B or 1, 1, T, S): True where a query may look at a key.

    The queries are the last T of the S slots.  A query sees itself and the slots before it, at most
    `window` in all, without padding (`padding` is (B, S), 0 for padding).  Where it numbers rows
    that share a window, 1, 2, ..., a token sees those of its own number alone.  Even padding sees
    itself: a softmax over no key is undefined.
    """
    q = torch.arange(slots - queries, slots, device=device).view(-1, 1)
    k = torch.arange(slots, device=device).view(1, -1)
    mask = k <= q
    if window is not None:
        mask = mask & (k > q - window)
    mask = mask[None, None]
    if padding is not None:
        of_query, of_key = padding[:, None, slots - queries :, None], padding[:, None, None, :]
        mask = mask & (of_key != 0) & ((of_key == of_query) | (of_query == 0))
    return mask | (k == q)


def block_mask(
    T: int, S: int, window: int | None, padding: Tensor | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Mask and `causal` for blocks with this window.  Without padding, and with a window that
    holds all slots, no mask is needed: a single query sees every key, T = S queries a triangle.
    """
    if padding is None and (window is None or window >= S) and T in (1, S):
        return None, T > 1
    return visible(T, S, window, padding, device), False


def positions(T: int, S: int, limit: int, device: torch.device) -> Tensor:
    """Position ids (1, T) of the last T of S tokens, counted 0, 1, 2, ..."""
    if limit < S:
        raise ValueError(f"{S} tokens exceed the {limit} positions of the model")
    return torch.arange(S - T, S, device=device)[None]


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float
) -> Tensor:
    """The equation, term by term: q (B, H, T, N), k and v (B, G, S, N) -> (B, H, T, N)."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))  # (B, H, S, N)
    scores = scale * q @ k.transpose(-2, -1)  # (B, H, T, S)
    if causal:
        mask = visible(q.size(-2), k.size(-2), device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v


def fast_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float
) -> Tensor:
    """The same, tile by tile (FlashAttention, https://arxiv.org/abs/2205.14135): no (T, S) matrix
    is kept for the backward pass.
    """
    return F.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.size(1) != k.size(1),
    )


class Cache:
    """Keys and values of the tokens so far, for one block, written in place."""

    def __init__(self, batch: int, heads: int, slots: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, heads, slots, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes k and v of the T new tokens, (B, H, T, N); returns those of all S tokens."""
        start, self.length = self.length, self.length + k.size(-2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D).

    Args:
        width, heads: D and H.
        scale: factor of the scores, 1 / sqrt(N) in the paper, 1 in GPT-Neo.
        bias: whether query, key and value have a bias; the output projection always has.
        dropout: probability of dropping an attention weight while training.
        window: number of keys a query sees, for methods that add keys; None: all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        scale: float,
        bias: bool,
        dropout: float,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.query = Linear(width, width, bias=bias)
        self.key = Linear(width, width, bias=bias)
        self.value = Linear(width, width, bias=bias)
        self.output = Linear(width, width)
        self.prefix = NoPrefix()
        self.attend = fast_attention
        self.head_width = width // heads
        self.scale = scale
        self.window = window
        self.dropout = dropout

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, cache: Cache | None = None
    ) -> Tensor:
        """`mask` (B or 1, 1, T, S), True where visible.  `mask` None: every key is visible, or,
        with `causal`, the first t + 1 for query t.
        """
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, T, D) -> (B, H, T, N)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        if cache is not None:
            k, v = cache.append(k, v)
        k, v, mask, causal = self.prefix(k, v, mask, causal)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, causal, self.scale, dropout)
        return self.output(y.transpose(1, 2).flatten(-2))
