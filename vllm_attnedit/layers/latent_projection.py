"""``kv_b_proj`` in the products of both forms of latent attention.

Shapes: T tokens, N heads of this rank, R kv_lora_rank, C qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.utils import set_weight_attrs


class LatentUpProjection(nn.Module):
    """``kv_b_proj``: rows ``[k_nope | v]`` of every head. Sharded by head, never quantised.

    A bare parameter rather than a vLLM linear layer: the CPU platform repacks and empties a linear
    layer's weight after loading, and the absorbed products need views of it. Nor can LoRA adapters
    attach to it, whom those products would never ask. To vLLM's MLA layer it looks like an
    unquantised linear layer.
    """

    quant_method = None

    def __init__(self, rank: int, num_heads: int, nope_dim: int, value_dim: int) -> None:
        super().__init__()
        self.num_heads, self.nope_dim = num_heads, nope_dim
        self.weight = nn.Parameter(
            torch.empty(num_heads * (nope_dim + value_dim), rank), requires_grad=False
        )
        set_weight_attrs(self.weight, {"weight_loader": self._load})

    def _load(self, param: nn.Parameter, loaded: Tensor) -> None:
        rows = param.shape[0]
        start = get_tensor_model_parallel_rank() * rows
        param.data.copy_(loaded[start : start + rows])

    def forward(self, latent: Tensor) -> tuple[Tensor, None]:
        """(T, R) to (T, N * (C + V)), as vLLM's linear layers return it."""
        return latent @ self.weight.T, None

    def _by_head(self) -> Tensor:
        return self.weight.unflatten(0, (self.num_heads, -1))  # (N, C + V, R)

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """(T, N, C) to the latent space: (T, N, R)."""
        w_uk = self._by_head()[:, : self.nope_dim]  # (N, C, R)
        return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)

    def expand_key(self, latent: Tensor) -> Tensor:
        """(T, R) to the unrotated keys of all heads: (T, N, C)."""
        w_uk = self._by_head()[:, : self.nope_dim]  # (N, C, R)
        return torch.matmul(latent, w_uk.transpose(1, 2)).transpose(0, 1)

    def expand_value(self, latent: Tensor, out: Tensor) -> None:
        """(T, N, R) from the latent space into ``out`` (T, N, V)."""
        w_uv = self._by_head()[:, self.nope_dim :]  # (N, V, R)
        torch.bmm(latent.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(T, R) to keys (T, N, C) and values (T, N, V)."""
        both = (latent @ self.weight.T).unflatten(-1, (self.num_heads, -1))
        return both[..., : self.nope_dim], both[..., self.nope_dim :]
