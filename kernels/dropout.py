"""Which inputs dropout keeps: one bit for each element, the same whatever the route of the product.

An element is kept where a random number of 16 bits is at least 2^16 p; bit k % 8 of byte
(m, k // 8) says so.  On a GPU the bits are drawn by Philox (kernels/lora_triton.py), on a CPU here.
"""

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Bits (M, ceil(K / 8)) of the elements of x (M, K), on a CPU, that dropout keeps."""
    M, K = x.shape
    random = torch.Generator().manual_seed(int(seed))
    words = torch.empty(M, -(-K // 4), dtype=torch.int64).random_(-(2**63), None, generator=random)
    mask = words.numpy().view(np.uint16)[:, :K] >= threshold(p)
    return torch.from_numpy(np.packbits(mask, axis=1, bitorder="little"))


def threshold(p: float) -> int:
    """2^16 p, at most the largest number of 16 bits."""
    return min(round(p * 2**16), 2**16 - 1)


def unpack(bits: Tensor, K: int) -> Tensor:
    """The mask (M, K) that the bits stand for."""
    if is_fake(bits):  # of a plan: its shape alone
        return bits.new_zeros(len(bits), K, dtype=torch.bool)
    if bits.device.type == "cpu":
        mask = np.unpackbits(bits.numpy(), axis=1, count=K, bitorder="little")
        return torch.from_numpy(mask.view(bool))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> places & 1).flatten(1)[:, :K].bool()
