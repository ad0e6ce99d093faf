"""How the latent decode kernel is launched: a table, measured once."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attnedit.ops.gateswa_decode.config import power_of_two

#: Most programs that may share one sequence.
MAX_SPLITS = 128
#: Keys below which another program costs more than it saves.
KEYS_PER_SPLIT = 256
#: Programs of the default tile that fit a multiprocessor at once.
RESIDENT = 2


@dataclass(frozen=True)
class LatentConfig:
    """Launch parameters.

    Attributes:
        rows: query rows of a program, each one (token, head).
        tile: keys of one step.
        splits: programs that share one sequence.
        warps: warps of a program.
        stages: depth of the load pipeline.
        aligned: a tile lies in one page, whose size is a multiple of it, and takes one scalar read
            of the block table.
    """

    rows: int
    tile: int
    splits: int
    warps: int = 4
    stages: int = 2
    aligned: bool = False


def latent_config(
    *,
    num_heads: int,
    max_query_len: int,
    max_seq_len: int,
    width: int,
    itemsize: int,
    page: int,
    num_requests: int,
    multiprocessors: int,
) -> LatentConfig:
    """The launch for a batch, from what the host knows of it.

    Args:
        num_heads: N.
        max_query_len: query tokens a request, at most.
        max_seq_len: tokens a request, at most.
        width: kv_lora_rank, padded to a power of two.
        itemsize: bytes of a query's element.
        page: block size.
        num_requests: R.
        multiprocessors: of the device.
    """
    rows = 32 if num_heads * max_query_len > 16 else 16
    # 64 keys of 512 + 64 in 2 bytes, the queries and the weights: 112 KiB, two programs side by
    # side on a Hopper multiprocessor, which is where the memory system fills up.
    tile = 64
    while tile > 16 and tile * width * itemsize > 64 * 1024:
        tile //= 2
    if itemsize > 2:
        rows, tile = 16, 16
    tile = min(tile, power_of_two(max(16, max_seq_len)))

    tasks = num_requests * -(-num_heads * max_query_len // rows)
    splits = 1
    while (
        splits < MAX_SPLITS
        and tasks * splits * 2 <= RESIDENT * multiprocessors
        and max_seq_len >= splits * 2 * KEYS_PER_SPLIT
    ):
        splits *= 2
    return LatentConfig(rows=rows, tile=tile, splits=splits, aligned=page % tile == 0)
