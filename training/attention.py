"""Attention over packed sequences: no token sees another document, window layers see their window.

Three forms of the same function, chosen by ``run.attention``:

- ``varlen``: flash attention over the documents laid end to end (``torch.nn.attention.varlen``). A
  mask is a list of ends, the work is that of the documents and windows alone, and no (T, T) object
  exists. CUDA in bf16 or fp16; the default there.
- ``flex``: FlexAttention with block masks, compiled. The alternative on CUDA: no flash kernels
  needed.
- ``sdpa``: scaled dot-product attention with a boolean (B, 1, T, T) mask. CPU, NPU, float32, and
  the oracle of the other two.

Shapes: B sequences, T tokens, N query heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.data.batches import Batch
from vllm_attnedit.config import FULL, SLIDING
from vllm_attnedit.errors import AttnEditError

IMPLEMENTATION = "attnedit_packed"
"""Name under which transformers knows :func:`packed_attention`."""


class DocumentEnds(NamedTuple):
    """The ``varlen`` mask: where documents end in the flattened batch.

    Attributes:
        cu_seqlens: (documents + 1,) int32, starting with 0; trailing empty documents are padding.
        max_length: no document is longer.
    """

    cu_seqlens: Tensor
    max_length: int


Mask = Tensor | BlockMask | DocumentEnds


def register() -> str:
    """Make transformers know the packed attention; returns its name. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    return IMPLEMENTATION


def choose(requested: str, device: torch.device, precision: str) -> str:
    """The form that ``run.attention`` means on a device.

    Raises:
        AttnEditError: if the device or the precision cannot run the one that was asked for.
    """
    fast = device.type == "cuda" and precision == "bf16"
    if requested == "auto":
        return "varlen" if fast else "sdpa"
    if requested == "flex" and device.type == "cpu":
        raise AttnEditError("run.attention", requested, "use sdpa: it has no backward on a CPU")
    if requested == "varlen" and device.type == "cuda" and not fast:
        raise AttnEditError("run.attention", requested, "use run.precision: bf16, or flex or sdpa")
    return requested


def build_masks(batch: Batch, form: str, window: int | None) -> dict[str, Mask]:
    """Masks of a batch by layer type, as the reference model takes them.

    Args:
        batch: on the device of the model.
        form: ``varlen``, ``flex`` or ``sdpa``.
        window: keys that a window layer sees, the query's own included; ``None`` without such
            layers.
    """
    if form == "varlen":
        # Compiled once for any number of documents, not once for the first and once for all others.
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        ends = DocumentEnds(batch.cu_seqlens, batch.max_length)
        # The window travels with the layer, so both kinds share the ends.
        return {FULL: ends, SLIDING: ends}
    make = _block_mask if form == "flex" else _boolean_mask
    masks: dict[str, Mask] = {FULL: make(batch.documents, None)}
    if window is not None:
        masks[SLIDING] = make(batch.documents, window)
    return masks


def _boolean_mask(documents: Tensor, window: int | None) -> Tensor:
    """(B, 1, T, T), True where a query (row) sees a key (column)."""
    places = torch.arange(documents.shape[1], device=documents.device)
    behind = places[:, None] - places  # (T, T)
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    return (seen & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)


def _block_mask(documents: Tensor, window: int | None) -> BlockMask:
    def visible(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= k) & (documents[b, q] == documents[b, k])
        return seen if window is None else seen & (q - k < window)

    rows, length = documents.shape
    return create_block_mask(
        visible, rows, None, length, length, device=documents.device, _compile=documents.is_cuda
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, for any of the three kinds of mask.

    Args:
        module: the attention layer.
        query: (B, N, T, D).
        key: (B, K, T, D).
        value: (B, K, T, V).
        attention_mask: what :func:`build_masks` made.
        dropout: must be 0: distillation compares exact outputs.
        scaling: of the scores.
        sliding_window: of the layer; only ``varlen`` needs it, as other masks contain it.

    Returns:
        (B, T, N, V), and no weights.
    """
    if dropout:
        raise AttnEditError(
            "attention_dropout", dropout, "set it to 0 in the teacher's config.json"
        )
    if torch.is_autocast_enabled(query.device.type):
        # Autocast casts for scaled dot-product attention, not for the two others; their inputs are
        # float32 where the norms and the rotary embedding are: when all of the model trains.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, DocumentEnds):
        attend = _flash_varlen if query.is_cuda else _plain_varlen
        return attend(query, key, value, attention_mask, scaling, sliding_window), None
    if isinstance(attention_mask, BlockMask):
        output = _flex(query, key, value, attention_mask, scaling)
        return output.transpose(1, 2), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _none = sdpa(module, query, key, value, attention_mask, scaling=scaling)
    return output, None


def _flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: DocumentEnds,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    rows, heads, length, width = query.shape
    value_width = value.shape[-1]
    if value_width < width:
        # One width for all three is all the kernel takes; zeros in a value add nothing.
        value = functional.pad(value, (0, width - value_width))
    # (B T, heads, D): the layout of the projections, so that nothing is copied.
    flat_query, flat_key, flat_value = (
        x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
    # The kernel counts the keys to the left of the query's own.
    left = -1 if window is None else window - 1
    output = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        mask.cu_seqlens,
        mask.cu_seqlens,
        mask.max_length,
        mask.max_length,
        scale=scaling,
        window_size=(left, 0),
    )
    assert isinstance(output, Tensor)
    return output.view(rows, length, heads, width)[..., :value_width]


def _plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: DocumentEnds,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same, document by document in plain PyTorch: where there is no flash kernel."""
    groups = query.shape[1] // key.shape[1]
    rows, heads, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)  # (N, B T, .)
    ends = mask.cu_seqlens.tolist()
    pieces = []
    for start, end in itertools.pairwise(ends):
        if start == end:
            continue
        places = torch.arange(end - start, device=query.device)
        behind = places[:, None] - places
        seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        part = slice(start, end)
        pieces.append(
            functional.scaled_dot_product_attention(
                q[None, :, part], k[None, :, part], v[None, :, part], seen, scale=scaling
            )[0]
        )
    output = torch.cat(pieces, dim=1).transpose(0, 1)  # (B T, N, V)
    return output.reshape(rows, length, heads, -1)


# Compiled once for the process; only CUDA has the kernels.
_compiled_flex: Any = None


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None
) -> Tensor:
    global _compiled_flex
    function: Any = flex_attention
    if query.is_cuda and not torch.compiler.is_compiling():
        if _compiled_flex is None:
            _compiled_flex = torch.compile(flex_attention, dynamic=False)
        function = _compiled_flex
    output: Tensor = function(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output
