"""Masked language modelling.  Devlin et al. 2018, section 3.1, https://arxiv.org/abs/1810.04805

In each row k = max(1, round(0.15 n)) of its n ordinary tokens are chosen, and the model predicts
them:

    a chosen token reads   [MASK] in 80 %,   any ordinary token in 10 %,   itself in 10 % of cases
    loss = - 1/k sum_(t chosen) log p(token_t | the row as it reads)

A row is a window of a text between [CLS] and [SEP], or <s> and </s> of RoBERTa.  Special tokens are
neither chosen nor drawn as a replacement.  A batch is a function of the seed and its number alone.

Nine of ten batches hold rows of a quarter of the length, four times as many: at first, attention
over long rows costs more than it teaches.  (The paper has the long rows in the last tenth of the
steps; here they are mixed with the short ones, so that not all fall where the rate is small.)

Shapes:  B batch   T time   D width
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.text import IGNORED, Batch, RandomWindows
from minigpt.data.tokenizer import MARKS, Special, Tokenizer
from minigpt.models.architecture import Model
from minigpt.models.attention import Attention
from minigpt.models.bert import Bert, BertConfig
from minigpt.models.mode import mode
from minigpt.objectives.causal import LanguageModel
from minigpt.objectives.cross_entropy import chunked_cross_entropy
from minigpt.objectives.objective import Objective, Windows
from minigpt.settings.sizes import SizeOptions

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1
SHORTER, LONG_EVERY = 4, 10


@dataclass(frozen=True)
class Masking:
    """Windows (B, T - 2) -> a batch: `input_ids` and `labels`, both (B, T).

    Attributes:
        special: ids of the special tokens.
        vocab_size: ids there are, 0 to vocab_size - 1.
    """

    special: Special
    vocab_size: int

    def __call__(self, windows: Tensor, random: np.random.Generator) -> Batch:
        ids = F.pad(windows, (1, 0), value=self.special.first)
        ids = F.pad(ids, (0, 1), value=self.special.last)
        is_ordinary = ~torch.isin(ids, torch.tensor(self.special))
        n = is_ordinary.sum(1, keepdim=True)
        # k = max(1, round(0.15 n)), and none of a row that has none
        k = (SHARE * n).round().clamp(min=1).minimum(n)
        place = torch.from_numpy(random.random(ids.shape)).masked_fill(~is_ordinary, 1.0)
        chosen = place.argsort(1).argsort(1) < k  # the k smallest
        ordinary = np.setdiff1d(np.arange(self.vocab_size), self.special)
        other = torch.from_numpy(random.choice(ordinary, ids.shape))
        fate = torch.from_numpy(random.random(ids.shape))
        read = ids.masked_fill(chosen & (fate < MASKED), self.special.mask)
        read = read.where(~chosen | (fate < MASKED) | (fate >= MASKED + RANDOM), other)
        return {"input_ids": read, "labels": ids.masked_fill(~chosen, IGNORED)}


@dataclass(frozen=True)
class MaskedWindows:
    """Batch i: rows that begin anywhere in `tokens` (n,), masked anew for every i.  Every tenth
    batch has `batch_size` rows of `length`, the others four times as many of a quarter.
    """

    tokens: Tensor
    length: int
    batch_size: int
    seed: int
    masking: Masking

    def __post_init__(self) -> None:
        if self.length // SHORTER <= MARKS:
            raise ValueError(
                f"sequence_length is {self.length}, must be at least {SHORTER * (MARKS + 1)}: "
                f"rows of a quarter of it hold [CLS], a token and [SEP]"
            )
        self._windows(1)  # refuses a text that is too short

    def _windows(self, parts: int) -> RandomWindows:
        length = self.length // parts - MARKS
        return RandomWindows(self.tokens, length, self.batch_size * parts, self.seed)

    def __call__(self, i: int) -> Batch:
        windows = self._windows(1 if i % LONG_EVERY == LONG_EVERY - 1 else SHORTER)
        random = np.random.default_rng([self.seed, i, 1])  # the windows draw from [seed, i]
        return self.masking(windows(i)["input_ids"], random)


@torch.no_grad()
def start_local(model: Bert) -> None:
    """Starts a fresh model with heads that look at near tokens.

    Random positions do not encode distance, and a model whose heads cannot tell neighbours learns
    which words occur in a text but not their order.  So, after Trockman and Kolter 2023
    (https://arxiv.org/abs/2305.09828), positions start as the sinusoids of Vaswani et al. 2017 and
    keys as copies of the queries; training may change all of them.
    """
    position = model.embeddings.position.weight
    T, D = position.shape
    # position[t] = 0.1 [sin(t w_k), cos(t w_k)],    w_k = 100^(-2k / D),    k = 0 ... D/2 - 1
    angle = torch.arange(T)[:, None] * 100 ** (-2 / D * torch.arange(D // 2))
    position[:, : D // 2 * 2] = 0.1 * torch.cat([angle.sin(), angle.cos()], 1)
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        query, key = attention.query.weight, attention.key.weight
        # q_t . k_s / sqrt(N) = 8 cos(x_t, x_s) on average, with |x|^2 = D
        query.normal_(std=math.sqrt(8 / (D * math.sqrt(D / model.config.num_attention_heads))))
        key.copy_(query)


def fixed_masked_windows(
    tokens: Tensor, length: int, batch_size: int, masking: Masking
) -> Iterator[Batch]:
    """Windows side by side over `tokens` (n,), with masks that do not depend on the run's seed.
    The rest at the end is a batch of one shorter row.
    """
    if torch.isin(tokens, torch.tensor(masking.special)).all():
        raise ValueError("the held-out text has no token to mask")
    inner = length - MARKS
    rows = len(tokens) // inner
    whole, rest = tokens[: rows * inner].view(rows, inner), tokens[rows * inner :]
    for i, windows in enumerate([*whole.split(batch_size), rest[None]]):
        if windows.numel():
            yield masking(windows.long(), np.random.default_rng([i]))


def masked_language_model_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean loss in nats over the chosen tokens; only their states go through the head."""
    x = model.hidden(batch["input_ids"], attention_mask=batch.get("attention_mask"))
    return chunked_cross_entropy(x, model.head, batch["labels"])


def new_encoder(size: SizeOptions, tokenizer: Tokenizer, positions: int) -> Bert:
    """A Bert with fresh weights and a masked-language head, started by `start_local`."""
    if size.window_size is not None:
        raise ValueError("--window-size belongs to --objective clm, not mlm")
    model = Bert(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=positions,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            intermediate_size=4 * size.hidden_size,
            hidden_dropout_prob=size.dropout,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.special.pad,
        ),
        head="masked-lm",
    )
    start_local(model)
    return model


def masked_windows(w: Windows) -> MaskedWindows:
    """Batches to train on."""
    masking = Masking(w.tokenizer.special, w.tokenizer.vocab_size)
    return MaskedWindows(w.tokens, w.length, w.batch_size, w.seed, masking)


def heldout_windows(w: Windows) -> Iterator[Batch]:
    """Batches to evaluate on."""
    masking = Masking(w.tokenizer.special, w.tokenizer.vocab_size)
    return fixed_masked_windows(w.tokens, w.length, w.batch_size, masking)


@torch.no_grad()
def filled(model: Model, tokenizer: Tokenizer, prompt: Tensor, seed: int) -> str:
    """The beginning of a text (1, T) with some tokens masked, and as the model fills them in."""
    masking = Masking(tokenizer.special, tokenizer.vocab_size)
    batch = masking(prompt.long().cpu(), np.random.default_rng(seed))
    chosen = batch["labels"] != IGNORED
    read = batch["input_ids"].masked_fill(chosen, tokenizer.special.mask).to(prompt.device)
    with mode(model, training=False):
        likely = model(read).argmax(-1)
    filled_in = read.where(~chosen.to(read.device), likely)
    return "\n".join(tokenizer.decode(ids[0, 1:-1].tolist()) for ids in (read, filled_in))


MLM = Objective(
    about="a Bert that predicts masked tokens",
    head="masked-lm",
    learn_tokenizer=Tokenizer.train_word_piece,
    new_model=new_encoder,
    batches=masked_windows,
    heldout=heldout_windows,
    loss=masked_language_model_loss,
    sample=filled,
    predicts_every_token=False,
)
