"""BERT, an encoder.  Devlin et al. 2018, https://arxiv.org/abs/1810.04805

    x_0  = norm(token[id] + position[t] + segment[type])
    x   <- norm(x + attention(x))           every token sees every other: softmax(Q K^T / sqrt(N)) V
    x   <- norm(x + mlp(x))                 gelu, inner width 4 D

    masked-language head:   logits = norm(gelu(x W + b)) token^T + c         (B, T, V)
    classification head:    logits = tanh(x[first] W_p + b_p) W_c + b_c      (B, classes)

Shapes:  B batch   T time   D width   H heads   N head width   V vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.models.architecture import Architecture, Model
from minigpt.models.attention import Attention, positions
from minigpt.models.config import MAX_LAYERS, between, one_of, probability, short, size
from minigpt.models.linear import Linear
from minigpt.models.mlp import ACTIVATIONS, MLP
from minigpt.models.names import Names
from minigpt.models.slots import NoPrompt


@dataclass(frozen=True)
class BertConfig:
    """Shapes and constants, under the names of Hugging Face's config.json."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    id2label: Mapping[str, str] | None = None  # names of the classes, by their numbers

    def __post_init__(self) -> None:
        size(self, "vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size")
        size(self, "num_attention_heads", "intermediate_size")
        size(self, "num_hidden_layers", at_most=MAX_LAYERS)
        probability(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        if self.classifier_dropout is not None:
            probability(self, "classifier_dropout")
        between(self, 0, 1, "layer_norm_eps")
        between(self, 0, 100, "initializer_range")
        one_of(self, "hidden_act", ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not all(number.isdecimal() for number in self.id2label or ()):
            raise ValueError(f"id2label {short(self.id2label)}: want the numbers of the classes")


class Embeddings(nn.Module):
    """ids, positions and segments, (B, T) each -> x_0 (B, T, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.prompt = NoPrompt()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        x, position_ids = self.prompt(self.token(input_ids), position_ids, True)
        token_type_ids = F.pad(token_type_ids, (self.prompt.length, 0))
        x = x + self.position(position_ids) + self.segment(token_type_ids)
        return self.dropout(self.norm(x))


class Block(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.attention = Attention(
            width,
            heads,
            scale=(width // heads) ** -0.5,
            bias=True,
            dropout=config.attention_probs_dropout_prob,
        )
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, causal=False)))
        x = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return x


class MaskedLMHead(nn.Module):
    """States (..., D) -> logits (..., V) of the token under the mask."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.transform(x))))


class ClassificationHead(nn.Module):
    """Pooled state (B, D) -> logits (B, classes)."""

    def __init__(self, config: BertConfig, num_labels: int) -> None:
        super().__init__()
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = Linear(config.hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(x))


class Bert(Model):
    """Token ids (B, T) -> the output of the head.

    Args:
        config: shapes and constants.
        head: "masked-lm" -> (B, T, V), "classification" -> (B, num_labels), "none" -> the states
            (B, T, D).
        num_labels: number of classes, for "classification".
    """

    config: BertConfig

    def __init__(self, config: BertConfig, head: str = "none", num_labels: int = 2) -> None:
        super().__init__()
        self.config = config
        self.head_kind = head
        self.names = NAMES.bare() if head == "none" else NAMES
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head: nn.Module = nn.Identity()
        self.task_type = "FEATURE_EXTRACTION"
        if head == "masked-lm":
            self.head = MaskedLMHead(config)
        else:
            self.pooler = Linear(config.hidden_size, config.hidden_size)
        if head == "classification":
            self.head = ClassificationHead(config, num_labels)
            self.num_labels = num_labels
            self.task_type = "SEQ_CLS"
        self.apply(self.initialize)
        self.tie()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """`attention_mask` (B, T): 0 for padding.  `position_ids` (B or 1, T): 0, 1, 2, ... unless
        given.  `token_type_ids` (B, T): segments, 0 unless given.
        """
        x = self._states(input_ids, attention_mask, position_ids, token_type_ids)
        classifies = self.head_kind == "classification"
        return self.head(self.pooled(x) if classifies else self._of_tokens(x))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """The states (B, T, D) before the head."""
        x = self._states(input_ids, attention_mask, position_ids, token_type_ids)
        return self._of_tokens(x)

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> Tensor:
        """The states of the prompt, if any, and of the tokens."""
        if position_ids is None:
            position_ids = self.position_ids(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        mask = None if attention_mask is None else self._mask(attention_mask)
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def position_ids(self, input_ids: Tensor) -> Tensor:
        """0, 1, 2, ..., (1, T)."""
        T = input_ids.size(1)
        return positions(T, T, self.max_tokens, input_ids.device)

    def _of_tokens(self, x: Tensor) -> Tensor:
        return x[:, self.embeddings.prompt.length :]

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURE

    def pooled(self, x: Tensor) -> Tensor:
        """States (B, T, D) -> tanh(x[first] W_p + b_p), (B, D)."""
        return self.pooler(x[:, 0]).tanh()

    def _mask(self, padding: Tensor) -> Tensor:
        """(B, T) -> (B, 1, 1, T): no query sees padding, except in a row of padding alone."""
        real = F.pad(padding, (self.embeddings.prompt.length, 0), value=1) != 0
        return (real | ~real.any(1, keepdim=True))[:, None, None, :]

    @property
    def unembedding(self) -> nn.Linear | None:
        """The masked-language head's last layer."""
        return self.head.decoder if isinstance(self.head, MaskedLMHead) else None

    def initialize(self, module: nn.Module) -> None:
        """Weights from N(0, initializer_range^2), the classifier's Xavier's; biases 0, norms 1."""
        if isinstance(module, nn.Linear) and module is getattr(self.head, "classifier", None):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


NAMES = Names(
    {
        "embeddings.token": "bert.embeddings.word_embeddings",
        "embeddings.position": "bert.embeddings.position_embeddings",
        "embeddings.segment": "bert.embeddings.token_type_embeddings",
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "blocks.{}": "bert.encoder.layer.{}",
        "blocks.{}.attention": "bert.encoder.layer.{}.attention",
        "blocks.{}.attention.query": "bert.encoder.layer.{}.attention.self.query",
        "blocks.{}.attention.key": "bert.encoder.layer.{}.attention.self.key",
        "blocks.{}.attention.value": "bert.encoder.layer.{}.attention.self.value",
        "blocks.{}.attention.output": "bert.encoder.layer.{}.attention.output.dense",
        "blocks.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "blocks.{}.mlp.up": "bert.encoder.layer.{}.intermediate.dense",
        "blocks.{}.mlp.down": "bert.encoder.layer.{}.output.dense",
        "blocks.{}.mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "pooler": "bert.pooler.dense",
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.decoder": "cls.predictions.decoder",
        "head.decoder.bias": "cls.predictions.bias",
        "head.classifier": "classifier",
    },
    prefix="bert.",
    renamed={
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignorable=[r"bert\.embeddings\.(position_ids|token_type_ids)", r"cls\.seq_relationship\..*"],
)

ARCHITECTURE = Architecture(
    model_type="bert",
    model=Bert,
    config=BertConfig,
    names=NAMES,
    heads={
        "masked-lm": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "none": "BertModel",
    },
    also={"BertForPreTraining": "masked-lm"},
    default="none",
    signs={"classification": "classifier.", "masked-lm": "cls.predictions."},
    dropped={
        "masked-lm": ("pooler.", "head.classifier."),
        "classification": ("head.",),
        "none": ("head.",),
    },
    fresh=("head.", "pooler."),
    copies={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
)
