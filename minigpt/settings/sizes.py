"""The size of a new model."""

from dataclasses import dataclass

from minigpt.models.config import MAX_LAYERS, probability, size
from minigpt.settings.options import option

WINDOW = 32  # keys that a local block sees, unless --window-size says otherwise


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """Shapes and dropout of a model with fresh weights."""

    hidden_size: int = option("width D", 224)
    num_layers: int = option("blocks; of clm, global and local in turn", 4)
    num_heads: int = option("heads H", 7)
    window_size: int | None = option(f"clm: keys that a local block sees (default: {WINDOW})", None)
    dropout: float = option("dropout on embeddings and residual branches", 0.1)

    def check_sizes(self) -> None:
        """Raises ValueError for a size that no model has, before a text is read."""
        size(self, "hidden_size", "num_heads")
        size(self, "num_layers", at_most=MAX_LAYERS)
        if self.window_size is not None:
            size(self, "window_size")
        probability(self, "dropout")
