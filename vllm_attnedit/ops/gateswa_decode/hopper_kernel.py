"""Gluon kernel for Hopper GPUs: the decode kernel of ``triton.py`` with its data paths laid out.

What bounds window decode is latency: a program reads a few dozen KiB and ends. So keys and values
are asked for before anything waits. A window of one tile goes to shared memory by asynchronous
copies; in longer ones, values travel in registers, so that the next tile's loads are under way
while this one is multiplied. Scores are formed transposed, keys by query rows: the matrix unit's
64-row operand is then the tile of keys, and the few query rows are its narrow side.

Shapes: G query heads a KV head, D head width, M query rows (token, head), S keys of a tile.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from vllm_attnedit.ops.gateswa_decode.hopper_ring import blocks, in_window, pointers


@gluon.jit
def hopper_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    gate_ptr,
    out_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    window,
    stride_q_token,
    stride_q_head,
    stride_table,
    stride_gate,
    stride_out_token,
    stride_out_head,
    STRIDE_K_BLOCK: gl.constexpr,
    STRIDE_K_TOKEN: gl.constexpr,
    STRIDE_K_HEAD: gl.constexpr,
    STRIDE_V_BLOCK: gl.constexpr,
    STRIDE_V_TOKEN: gl.constexpr,
    STRIDE_V_HEAD: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    PAGE: gl.constexpr,
    GATE: gl.constexpr,
    ROWS: gl.constexpr,
    TILE: gl.constexpr,
    SINGLE: gl.constexpr,
    ONE_QUERY: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    # Quantised entries pass through registers, where they are widened.
    QUANTISED: gl.constexpr = key_ptr.dtype.element_ty != dtype
    K_COPIED: gl.constexpr = not QUANTISED
    V_COPIED: gl.constexpr = SINGLE and not QUANTISED
    # 16 bytes a thread, a row of keys to half a warp.
    lanes: gl.constexpr = PADDED // 8
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    by_key: gl.constexpr = gl.SliceLayout(1, product)
    by_row: gl.constexpr = gl.SliceLayout(0, product)

    request = gl.program_id(0) // KV_HEADS
    kv_head = gl.program_id(0) % KV_HEADS
    length = gl.load(seq_lens_ptr + request)
    query_start = gl.load(query_start_ptr + request)
    query_len = gl.load(query_start_ptr + request + 1) - query_start
    if query_len <= 0:
        return

    begin = gl.maximum(length - query_len - window + 1, 0)
    first_page = begin // PAGE
    last_page = gl.maximum(length - 1, 0) // PAGE
    wrap = begin - first_page * PAGE
    # Positions count from the first page's first token.
    end = length - first_page * PAGE
    tiles = 1 if SINGLE else gl.cdiv(length - begin, TILE)
    ring = tiles * TILE
    table_ptr = block_table_ptr + request.to(gl.int64) * stride_table

    entry = gl.arange(0, TILE, layout=gl.SliceLayout(1, loads))
    dim = gl.arange(0, PADDED, layout=gl.SliceLayout(0, loads))
    k_shared = gl.allocate_shared_memory(dtype, [TILE, PADDED], shared)
    v_shared = gl.allocate_shared_memory(dtype, [TILE, PADDED], shared)

    block = blocks(table_ptr, first_page, last_page, 0, wrap, ring, entry, PAGE)
    held = in_window(0, wrap, ring, end, entry, dim, WIDTH)
    keys = pointers(
        key_ptr, block, kv_head, entry, dim, PAGE, STRIDE_K_BLOCK, STRIDE_K_TOKEN, STRIDE_K_HEAD
    )
    if K_COPIED:
        async_copy.async_copy_global_to_shared(k_shared, keys, mask=held)
        async_copy.commit_group()
    else:
        k = gl.load(keys, mask=held, other=0.0)
    values = pointers(
        value_ptr, block, kv_head, entry, dim, PAGE, STRIDE_V_BLOCK, STRIDE_V_TOKEN, STRIDE_V_HEAD
    )
    if V_COPIED:
        async_copy.async_copy_global_to_shared(v_shared, values, mask=held)
        async_copy.commit_group()
    else:
        v = gl.load(values, mask=held, other=0.0)
    if not SINGLE:
        block = blocks(table_ptr, first_page, last_page, TILE, wrap, ring, entry, PAGE)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, loads))
    q_offset = (query_start + row // GROUP).to(gl.int64) * stride_q_token
    q_offset += (kv_head * GROUP + row % GROUP) * stride_q_head
    q = gl.load(
        q_ptr + q_offset[:, None] + dim[None, :],
        mask=(row < GROUP * query_len)[:, None] & (dim[None, :] < WIDTH),
        other=0.0,
    )
    q_shared = gl.allocate_shared_memory(dtype, [ROWS, PADDED], shared, q)
    weights_shared = gl.allocate_shared_memory(dtype, [ROWS, TILE], shared)

    row = gl.arange(0, ROWS, layout=by_row)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_ok = row < GROUP * query_len
    value_dim = gl.arange(0, PADDED, layout=by_key)
    out_ok = row_ok[None, :] & (value_dim < WIDTH)[:, None]
    gate_row = (query_start + token).to(gl.int64) * stride_gate
    if GATE == 1:
        logits = gl.load(gate_ptr + gate_row + head, mask=row_ok, other=0.0)
    if GATE == 2:
        gate_offset = (gate_row + head * WIDTH)[None, :] + value_dim[:, None]
        logits = gl.load(gate_ptr + gate_offset, mask=out_ok, other=0.0)

    if k_scale_ptr is not None:
        scale *= gl.load(k_scale_ptr)
    key = gl.arange(0, TILE, layout=by_key)
    query_position = length - query_len + token - first_page * PAGE
    running_max = gl.full([ROWS], -1e30, gl.float32, by_row)
    running_sum = gl.full([ROWS], 0.0, gl.float32, by_row)
    acc = gl.zeros([PADDED, ROWS], gl.float32, product)
    for tile in range(tiles):
        key_position = tile * TILE + key
        key_position = gl.where(key_position < wrap, key_position + ring, key_position)
        visible = (key_position < end)[:, None] & (row < ROWS)[None, :]
        if not ONE_QUERY:
            distance = query_position[None, :] - key_position[:, None]
            visible = visible & (distance >= 0) & (distance < window)

        if K_COPIED:
            async_copy.wait_group(1 if V_COPIED else 0)
        else:
            k_shared.store(k.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        scores = gl.zeros([TILE, ROWS], gl.float32, product)
        scores = warpgroup_mma(k_shared, q_shared.permute([1, 0]), scores, use_acc=False)
        scores = gl.where(visible, scores * scale, -1e30)
        new_max = gl.maximum(running_max, gl.max(scores, 0))
        weights = gl.exp2(scores - new_max[None, :])
        weights_shared.store(gl.permute(weights.to(dtype), [1, 0]))
        if not V_COPIED:
            v_shared.store(v.to(dtype))
        if not SINGLE:
            # The next tile is asked for before this one's values are multiplied. The reduction
            # above is a barrier: all warps have read the keys.
            start = (tile + 1) * TILE
            held = in_window(start, wrap, ring, end, entry, dim, WIDTH) & (tile + 1 < tiles)
            keys = pointers(
                key_ptr,
                block,
                kv_head,
                entry,
                dim,
                PAGE,
                STRIDE_K_BLOCK,
                STRIDE_K_TOKEN,
                STRIDE_K_HEAD,
            )
            if K_COPIED:
                async_copy.async_copy_global_to_shared(k_shared, keys, mask=held)
                async_copy.commit_group()
            else:
                k = gl.load(keys, mask=held, other=0.0)
            values = pointers(
                value_ptr,
                block,
                kv_head,
                entry,
                dim,
                PAGE,
                STRIDE_V_BLOCK,
                STRIDE_V_TOKEN,
                STRIDE_V_HEAD,
            )
            v = gl.load(values, mask=held, other=0.0)
            start += TILE
            block = blocks(table_ptr, first_page, last_page, start, wrap, ring, entry, PAGE)
        decay = gl.exp2(running_max - new_max)
        running_sum = running_sum * decay + gl.sum(weights, 0)
        running_max = new_max
        if V_COPIED:
            async_copy.wait_group(0)
        if not SINGLE:
            acc = acc * decay[None, :]
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(v_shared.permute([1, 0]), weights_shared.permute([1, 0]), acc)

    seen = running_max > -1e29
    result = acc * gl.where(seen, 1.0 / gl.where(seen, running_sum, 1.0), 0.0)[None, :]
    if v_scale_ptr is not None:
        result = result * gl.load(v_scale_ptr)
    if GATE > 0:
        openness = 1.0 / (1.0 + gl.exp2(-1.4426950408889634 * logits.to(gl.float32)))
        if GATE == 1:
            openness = openness[None, :]
        result = result * openness
    out_offset = (query_start + token).to(gl.int64) * stride_out_token + head * stride_out_head
    gl.store(
        out_ptr + out_offset[None, :] + value_dim[:, None],
        result.to(out_ptr.dtype.element_ty),
        mask=out_ok,
    )
