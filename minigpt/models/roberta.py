"""RoBERTa, an encoder.  Liu et al. 2019, https://arxiv.org/abs/1907.11692

BERT (minigpt/models/bert.py) trained longer and without its second task.  What differs:

    positions   p + 1, p + 2, ... for real tokens, p for padding, p = `pad_token_id`
    classification head:    logits = tanh(drop(x[first]) W_d + b_d) W_c + b_c    without a pooler

PhoBERT (https://arxiv.org/abs/2003.00744) is a RoBERTa for Vietnamese.

Shapes:  B batch   T time   D width
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from minigpt.models.architecture import Architecture, Model
from minigpt.models.bert import Bert, BertConfig, Block, Embeddings, MaskedLMHead
from minigpt.models.linear import Linear
from minigpt.models.names import Names


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Shapes and constants, under the names of Hugging Face's config.json."""

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        room = self.max_position_embeddings - 1
        if self.pad_token_id is None or not 0 <= self.pad_token_id < min(self.vocab_size, room):
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, must be a token and leave a position: "
                "positions count from it"
            )

    @property
    def first_position(self) -> int:
        """p + 1."""
        return (self.pad_token_id or 0) + 1


class ClassificationHead(nn.Module):
    """State of the first token (B, D) -> logits (B, classes)."""

    def __init__(self, config: RobertaConfig, num_labels: int) -> None:
        super().__init__()
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.classifier = Linear(config.hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.dense(self.dropout(x)).tanh()))


class Roberta(Bert):
    """Token ids (B, T) -> the output of the head.

    Args:
        config: shapes and constants.
        head: "masked-lm" -> (B, T, V), "classification" -> (B, num_labels), "none" -> the states
            (B, T, D).
        num_labels: number of classes, for "classification".
    """

    config: RobertaConfig

    def __init__(self, config: RobertaConfig, head: str = "none", num_labels: int = 2) -> None:
        Model.__init__(self)
        self.config = config
        self.head_kind = head
        self.names = NAMES.bare() if head == "none" else NAMES
        self.embeddings = Embeddings(config)
        self.embeddings.prompt.first = config.first_position
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Identity()
        self.task_type = "FEATURE_EXTRACTION"
        if head == "masked-lm":
            self.head = MaskedLMHead(replace(config, hidden_act="gelu"))  # whatever the blocks have
        elif head == "classification":
            self.head = ClassificationHead(config, num_labels)
            self.num_labels = num_labels
            self.task_type = "SEQ_CLS"
        else:
            self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.apply(self.initialize)
        self.tie()

    def pooled(self, x: Tensor) -> Tensor:
        """States (B, T, D) -> that of the first token, (B, D)."""
        return x[:, 0]

    def position_ids(self, input_ids: Tensor) -> Tensor:
        """p + 1, p + 2, ... for real tokens, p for padding, (B, T)."""
        if (T := input_ids.size(1)) > self.max_tokens:
            raise ValueError(f"{T} tokens exceed the {self.max_tokens} positions of the model")
        p = self.config.first_position - 1
        real = (input_ids != p).long()
        return p + real.cumsum(1) * real

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURE

    @property
    def max_tokens(self) -> int:
        """Number of positions for tokens."""
        return super().max_tokens - self.config.first_position


NAMES = Names(
    {
        "embeddings.token": "roberta.embeddings.word_embeddings",
        "embeddings.position": "roberta.embeddings.position_embeddings",
        "embeddings.segment": "roberta.embeddings.token_type_embeddings",
        "embeddings.norm": "roberta.embeddings.LayerNorm",
        "blocks.{}": "roberta.encoder.layer.{}",
        "blocks.{}.attention": "roberta.encoder.layer.{}.attention",
        "blocks.{}.attention.query": "roberta.encoder.layer.{}.attention.self.query",
        "blocks.{}.attention.key": "roberta.encoder.layer.{}.attention.self.key",
        "blocks.{}.attention.value": "roberta.encoder.layer.{}.attention.self.value",
        "blocks.{}.attention.output": "roberta.encoder.layer.{}.attention.output.dense",
        "blocks.{}.attention_norm": "roberta.encoder.layer.{}.attention.output.LayerNorm",
        "blocks.{}.mlp.up": "roberta.encoder.layer.{}.intermediate.dense",
        "blocks.{}.mlp.down": "roberta.encoder.layer.{}.output.dense",
        "blocks.{}.mlp_norm": "roberta.encoder.layer.{}.output.LayerNorm",
        "pooler": "roberta.pooler.dense",
        "head.transform": "lm_head.dense",
        "head.norm": "lm_head.layer_norm",
        "head.decoder": "lm_head.decoder",
        "head.decoder.bias": "lm_head.bias",
        "head.dense": "classifier.dense",
        "head.classifier": "classifier.out_proj",
    },
    prefix="roberta.",
    renamed={"lm_head.decoder.bias": "lm_head.bias"},
    ignorable=[r"roberta\.embeddings\.(position_ids|token_type_ids)"],
)

ARCHITECTURE = Architecture(
    model_type="roberta",
    model=Roberta,
    config=RobertaConfig,
    names=NAMES,
    heads={
        "masked-lm": "RobertaForMaskedLM",
        "classification": "RobertaForSequenceClassification",
        "none": "RobertaModel",
    },
    default="none",
    signs={"classification": "classifier.", "masked-lm": "lm_head."},
    dropped={
        "masked-lm": ("pooler.", "head.dense.", "head.classifier."),
        "classification": ("pooler.", "head.transform.", "head.norm.", "head.decoder."),
        "none": ("head.",),
    },
    fresh=("head.classifier.", "head.", "pooler."),
    copies={"lm_head.bias": "lm_head.decoder.bias"},
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
)
