"""How the decode kernel is launched: a table, measured once, instead of tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass

#: Most programs that may share one window.
MAX_SPLITS = 16
#: Keys below which another program costs more than it saves.
KEYS_PER_SPLIT = 256
#: On-chip bytes of one tile of keys and values; three programs of these fit a multiprocessor.
TILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters.

    Attributes:
        rows: query rows of a program, each one (token, head) of a KV head's group.
        tile: keys of one step.
        splits: programs that share one window.
        warps: warps of a program.
        stages: depth of the load pipeline.
        aligned: tiles start at multiples of ``tile`` and lie in one page, so that a tile takes one
            scalar read of the block table. For targets where gathering pages is slow; costs a
            partly filled tile more.
    """

    rows: int
    tile: int
    splits: int
    warps: int = 4
    stages: int = 2
    aligned: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """Launch parameters of the Hopper kernel, which never splits a window.

    Attributes:
        rows: query rows of a program.
        tile: keys of one step; a multiple of the block size.
        single: one step takes the window.
        warps: warps of a program: 4 for every 64 keys of a tile at most.
    """

    rows: int
    tile: int
    single: bool
    warps: int = 4


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def decode_config(
    *,
    group: int,
    max_query_len: int,
    width: int,
    itemsize: int,
    window: int,
    num_requests: int,
    num_kv_heads: int,
    multiprocessors: int,
) -> DecodeConfig:
    """The launch for a batch, from what the host knows of it.

    Args:
        group: query heads a KV head.
        max_query_len: query tokens a request, at most.
        width: head width, padded to a power of two.
        itemsize: bytes of a cached element.
        window: keys a token sees.
        num_requests: R.
        num_kv_heads: K.
        multiprocessors: of the device.
    """
    rows = min(64, power_of_two(max(16, group * max_query_len)))
    rows = max(rows, power_of_two(group))  # the heads of one KV head stand in one tile
    tokens_per_tile = max(1, rows // group)
    tasks = num_requests * num_kv_heads * -(-max_query_len // tokens_per_tile)
    span = window + min(max_query_len, tokens_per_tile) - 1

    splits = 1
    while (
        splits < MAX_SPLITS
        and tasks * splits * 2 <= 2 * multiprocessors
        and window >= splits * 2 * KEYS_PER_SPLIT
    ):
        splits *= 2

    # One tile when the batch leaves every program a multiprocessor of its own: nothing else hides
    # the latency of a second step. Otherwise smaller tiles, more programs side by side.
    tile = 128 if tasks * splits <= multiprocessors or itemsize == 1 else 64
    tile = min(tile, power_of_two(max(16, -(-span // splits))))
    while tile > 16 and 2 * tile * width * itemsize > TILE_BYTES:
        tile //= 2
    return DecodeConfig(rows=rows, tile=tile, splits=splits)


#: Query rows that the Hopper kernel takes: the narrow side of its matrix products.
HOPPER_ROWS = 16


def hopper_config(
    *, group: int, max_query_len: int, width: int, window: int, page: int, quantised: bool
) -> HopperConfig | None:
    """The Hopper kernel's launch, or None for shapes that it does not take.

    Args:
        group: query heads a KV head.
        max_query_len: query tokens a request, at most.
        width: head width, padded to a power of two.
        window: keys a token sees.
        page: block size.
        quantised: the cache is narrower than the queries.
    """
    rows = power_of_two(max(8, group * max_query_len))
    span = window + max_query_len - 1
    # One step where that is enough; otherwise small ones, of which four programs fit side by side.
    tile = 128 if 64 < span <= 128 else 64
    # Widening entries between loads and products costs more than it hides in a loop.
    if quantised and span > tile:
        return None
    if rows > HOPPER_ROWS or width not in (64, 128) or tile % page:
        return None
    return HopperConfig(rows=rows, tile=tile, single=span <= tile)
