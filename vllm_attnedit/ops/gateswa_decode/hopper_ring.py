"""Where the entries of a tile of the Hopper kernel lie.

The tile starts at a page: entry i of the tile lies in page ``i // PAGE`` for every window, which
spares the address arithmetic. What lies before the window in the first page makes room for the
window's last tokens: the tile is a ring.

Shapes: D head width, S keys of a tile.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def blocks(table_ptr, first_page, last_page, tile_start, wrap, ring, entry, PAGE: gl.constexpr):
    """The blocks (S,) that hold a tile's entries."""
    page = first_page + (tile_start + entry) // PAGE
    page += gl.where(tile_start + entry < wrap, ring // PAGE, 0)
    # Beyond the sequence the last page stands in: masked, but a block that exists.
    return gl.load(table_ptr + gl.minimum(page, last_page))


@gluon.jit
def pointers(
    cache_ptr,
    block,
    kv_head,
    entry,
    dim,
    PAGE: gl.constexpr,
    STRIDE_BLOCK: gl.constexpr,
    STRIDE_TOKEN: gl.constexpr,
    STRIDE_HEAD: gl.constexpr,
):
    """Where a tile's entries (S, D) lie in a cache."""
    slot = (entry % PAGE) * STRIDE_TOKEN + kv_head * STRIDE_HEAD
    return cache_ptr + (block.to(gl.int64) * STRIDE_BLOCK + slot)[:, None] + dim[None, :]


@gluon.jit
def in_window(tile_start, wrap, ring, end, entry, dim, WIDTH: gl.constexpr):
    """Which of a tile's elements (S, D) belong to the window."""
    position = tile_start + entry
    position = gl.where(position < wrap, position + ring, position)
    return (position < end)[:, None] & (dim[None, :] < WIDTH)
