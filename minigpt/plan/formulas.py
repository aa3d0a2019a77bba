"""What a step costs by the formulas of the literature, to set beside what a trace counts.

    FLOPs       forward 2 N a token, backward twice that: 6 N D for D tokens
                Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1
                Of weights that do not train the backward pass computes dx alone: 4 N D.
    Attention   Q K^T and its product with V: 4 B H T S N forward, 2.5 times that backward, which
                computes Q K^T again.  Dao et al. 2022, https://arxiv.org/abs/2205.14135
    Memory      weights p, gradients p, AdamW's state 2 p, for p bytes of trained float32 weights.
                Over W processes ZeRO divides the state, the gradients and the weights by W.
                Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3
    Traffic     of a process, by rings: all-reduce 2 (W - 1) / W p;  sharded, weights gathered
                forward and backward, gradients scattered: 2 (W - 1) / W p + (W - 1) / W g
                the same, section 7
    Activations of one block of width D, H heads, B T tokens, 16 bits, dropout, scores kept:
                B T D (34 + 5 H T / D) bytes
                Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equation 1

Shapes:  B batch   T time   D width   H heads   N width of a head   S slots   W processes
"""


def flops(trained: int, frozen: int, tokens: int) -> int:
    """FLOPs of the products with weights, by the numbers in them."""
    return (6 * trained + 4 * frozen) * tokens


def attention_flops(
    batch: int, heads: int, queries: int, slots: int, width: int
) -> tuple[int, int]:
    """FLOPs of the two products of attention, forward and backward; a causal mask saves nothing."""
    forward = 4 * batch * heads * queries * slots * width
    return forward, forward * 5 // 2


def activations(batch: int, length: int, width: int, heads: int, layers: int) -> int:
    """Bytes of the activations of a GPT that keeps attention's scores and dropout's masks."""
    return layers * batch * length * (34 * width + 5 * heads * length)


def all_reduced(gradients: int, processes: int) -> int:
    """Bytes that a process sends in a data-parallel step."""
    return 2 * (processes - 1) * gradients // processes


def sharded(weights: int, gradients: int, processes: int) -> int:
    """Bytes that a process sends in a step of sharded training."""
    return (processes - 1) * (2 * weights + gradients) // processes
