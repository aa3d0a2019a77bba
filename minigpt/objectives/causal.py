"""Causal language modelling: predict each token from those before it.  Radford et al. 2018,
https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf

    loss = - 1/n sum_t log p(token_(t+1) | token_1 ... token_t)        n = number of labels

The logits are never all in memory at once (minigpt/objectives/cross_entropy.py).

Shapes:  B batch   T time
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from minigpt.data.text import Batch, RandomWindows, consecutive_windows
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models.architecture import Decoder
from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.objectives.cross_entropy import chunked_cross_entropy
from minigpt.objectives.objective import Objective
from minigpt.settings.sizes import WINDOW, SizeOptions

SAMPLE = 120  # tokens
PLACES = ("attention_mask", "position_ids")  # what a batch may say of where its tokens stand


class LanguageModel(Protocol):
    """A model that gives its states before the head."""

    head: nn.Module

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...


def language_model_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean loss in nats over the labels of a batch.

    `batch` holds `input_ids` and `labels`, both (B, T), and perhaps `attention_mask` and
    `position_ids`; labels are aligned with the states that predict them (the data shifts them),
    -100 where there is none.
    """
    places = {name: batch[name] for name in PLACES if name in batch}
    x = model.hidden(batch["input_ids"], **places)
    return chunked_cross_entropy(x, model.head, batch["labels"])


def new_decoder(size: SizeOptions, tokenizer: Tokenizer, positions: int) -> GPTNeo:
    """A GPT-Neo with fresh weights, of global and local blocks in turn."""
    return GPTNeo(
        GPTNeoConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=positions,
            hidden_size=size.hidden_size,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            window_size=WINDOW if size.window_size is None else size.window_size,
            embed_dropout=size.dropout,
            resid_dropout=size.dropout,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    )


def continued(model: Decoder, tokenizer: Tokenizer, prompt: Tensor, seed: int) -> str:
    """The beginning of a text (1, T), continued by the model."""
    new = min(SAMPLE, model.max_tokens - prompt.size(1))
    random = torch.Generator(prompt.device).manual_seed(seed)
    ids = generate(model, prompt, new, temperature=0.8, top_k=50, generator=random)
    return tokenizer.decode(ids[0].tolist())


CLM = Objective(
    about="a GPT-Neo that predicts the next token",
    head="causal-lm",
    learn_tokenizer=Tokenizer.train,
    new_model=new_decoder,
    batches=lambda w: RandomWindows(w.tokens, w.length, w.batch_size, w.seed),
    heldout=lambda w: consecutive_windows(w.tokens, w.length, w.batch_size),
    loss=language_model_loss,
    sample=continued,
    predicts_every_token=True,
)
