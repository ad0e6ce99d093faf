"""Operators of edited attention, one folder each: a plain torch oracle beside the Triton kernel.

==================  =====================================================================
gateswa_decode      paged window attention for one or a few query tokens a request, gated
gateswa_prefill     window attention over a dense chunk and the cached tail before it, gated
kv_write            QK-norm, RoPE and the paged write of K and V in one pass
mla_decode          absorbed latent attention over a paged latent cache
mla_prefill         latent attention over expanded keys and values
sigmoid_gate        attention output times the sigmoid of the gate's logits
==================  =====================================================================

Each folder exports one function, which checks its arguments, then runs ``reference.py`` on a CPU
and ``triton.py`` on a GPU (see :mod:`vllm_attnedit.ops.dispatch`). Nothing here knows vLLM, and
importing this package imports neither Triton nor CUDA.

Every kernel is deterministic: equal arguments give equal bits.
"""
