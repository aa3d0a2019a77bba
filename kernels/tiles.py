"""The sizes of tiles, a list for each architecture.

A tile of Y is (BM, BN) and walks over K in steps of BK; `num_stages` steps are under way at a time,
each with BM BK + BN BK elements of shared memory; `num_warps` warps share the BM BN accumulators.
`python -m minigpt_kernels.compile_all` compiles every row for its architecture and fails on one
that spills registers, overruns shared memory or misses the tensor cores.  Which is fastest is not
measured yet.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One row: sizes and launch options."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


RANK = 16  # ranks at a time in `expand`: more of them hold too many registers beside a tile of Y
FEW = 16  # rows that take the route for decoding

# capability -> from the largest tile to the smallest, for 16-bit inputs and for float32
EXPAND: dict[int, dict[int, list[Tile]]] = {
    80: {2: [Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4)], 4: [Tile(64, 64, 32, 4, 3)]},
    90: {2: [Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)], 4: [Tile(64, 64, 32, 4, 3)]},
    100: {2: [Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)], 4: [Tile(64, 64, 32, 4, 3)]},
}
# the same with descriptors, for 16-bit inputs, without and with dropout
EXPAND_TMA: dict[int, dict[bool, list[Tile]]] = {
    90: {
        False: [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)],
        True: [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)],
    },
    100: {
        False: [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)],
        True: [Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)],
    },
}
# where a size or a stride is no multiple of 16: element by element, so addresses take registers
ODD = {2: Tile(64, 64, 32, 8, 3), 4: Tile(64, 64, 16, 8, 3)}
# for 16-bit inputs and for float32; BN is the rank's tile
SHRINK = {2: Tile(32, 0, 64, 4, 3), 4: Tile(32, 0, 32, 4, 3)}
OUTER = {2: Tile(64, 0, 64, 4, 3), 4: Tile(32, 0, 32, 4, 3)}
RANKS = {2: (16, 32, 64), 4: (16, 32)}  # ranks at a time in `shrink` and `outer`
DECODE = Tile(FEW, 32, 128, 4, 4)
DECODE_SUM = Tile(FEW, 128, 0, 4, 2)
KEEP = 1024  # bytes of the mask in a program


def family(device: torch.device) -> int:
    """The capability whose list a device takes."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)  # 80's fit the consumer cards after it, too


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def fill(tiles: list[Tile], M: int, N: int, programs: int) -> Tile:
    """The largest tile of which Y (M, N) has enough for all programs; else the smallest."""
    enough = (t for t in tiles if programs <= -(-M // t.BM) * -(-N // t.BN))
    return next(enough, tiles[-1])


def rank_tile(R: int, size: int) -> int:
    """Ranks at a time in `shrink` and `outer`, for elements of `size` bytes."""
    return next((tile for tile in RANKS[size] if tile >= R), RANKS[size][-1])
