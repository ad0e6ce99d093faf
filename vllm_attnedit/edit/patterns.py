"""What is edited into what: the user's choices, and the defaults that turn them into an edit.

The defaults are this project's own where the method's paper is silent; docs/method.md says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_attnedit.config import FULL, LATENT, PER_HEAD, SLIDING, AttentionEdit
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import get_family

TARGETS = ("gateswa", "mla")
INITS = ("inherit", "random")
GATE_NAMES = ("headwise", "elementwise", "none")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
DEFAULT_WINDOW = 128
DEFAULT_ROPE_WIDTH = 64
GROUP = 6
"""One full layer in so many: a 5:1 pattern fits vLLM's KV cache groups without padding layers."""


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """The choices of one edit. ``None`` takes the default for the teacher at hand.

    Attributes:
        target: ``gateswa`` or ``mla``.
        init: ``inherit`` starts from the teacher's attention, ``random`` from noise (as the paper).
        window: of GateSWA's window layers, in tokens.
        full_layers: GateSWA's full-attention layers, by index.
        gate: ``headwise``, ``elementwise`` or ``none``.
        kv_lora_rank: of MLA, as are the dims that follow.
        qk_rope_head_dim: width of the shared RoPE key.
        qk_nope_head_dim: per-head width without position.
        v_head_dim: per-head value width; only the teacher's ``head_dim`` fits the inherited o_proj.
        q_lora_rank: rank of the query projection; ``None`` for a full-rank one.
        qk_norm: ``per_head`` keeps the teacher's QK-norm; ``None`` has a norm of the latent.
        dtype: of the written weights; ``None`` keeps each tensor as stored (bfloat16 for GGUF).
        seed: of what is drawn at random.
    """

    target: str
    init: str = "inherit"
    window: int | None = None
    full_layers: tuple[int, ...] | None = None
    gate: str | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_lora_rank: int | None = None
    qk_norm: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--target", self.target, TARGETS),
            ("--init", self.init, INITS),
            ("--gate", self.gate, (*GATE_NAMES, None)),
            ("--dtype", self.dtype, (*DTYPE_NAMES, None)),
            ("--qk-norm", self.qk_norm, (PER_HEAD, None)),
        ):
            if value not in known:
                *names, last = (name for name in known if name is not None)
                fix = (
                    f"use {', '.join(names)} or {last}" if names else f"use {last} or leave it out"
                )
                raise AttnEditError(option, value, fix)
        foreign = (*_OF_MLA, "qk_norm") if self.target == "gateswa" else _OF_GATESWA
        for name in foreign:
            if getattr(self, name) is not None:
                other = "mla" if self.target == "gateswa" else "gateswa"
                raise AttnEditError(
                    option_name(name), getattr(self, name), f"leave it out or use --target {other}"
                )
        for name in ("window", *_OF_MLA):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AttnEditError(option_name(name), value, "give an integer >= 1")


_OF_GATESWA = ("window", "full_layers")
_OF_MLA = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")


def option_name(field: str) -> str:
    """The command-line spelling of a field of :class:`EditPlan`."""
    return "--" + field.replace("_", "-")


def parse_full_layers(text: str) -> tuple[int, ...]:
    """``"5,11,17"`` as layer indices.

    Raises:
        AttnEditError: if it is empty or not a list of integers.
    """
    try:
        layers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise AttnEditError(
            "--full-layers", text, "give layer indices separated by commas, such as 5,11,17"
        ) from None
    if not layers:
        raise AttnEditError("--full-layers", repr(text), "name at least one layer, such as 5,11,17")
    return layers


def default_full_layers(num_layers: int) -> tuple[int, ...]:
    """The last layer of each group of six; the last layer of a model that has no whole group."""
    return tuple(i for i in range(num_layers) if i % GROUP == GROUP - 1) or (num_layers - 1,)


def build_edit(plan: EditPlan, config: Any) -> AttentionEdit:
    """The edit of a teacher with this ``config`` (its own, of any supported family).

    Raises:
        AttnEditError: naming the option that does not fit the teacher.
    """
    gate = plan.gate or ("headwise" if plan.target == "gateswa" else "none")
    gate_value = None if gate == "none" else gate
    if plan.target == "mla":
        return _latent_edit(plan, config, gate_value)
    num_layers = config.num_hidden_layers
    full = plan.full_layers if plan.full_layers is not None else default_full_layers(num_layers)
    if not full:
        raise AttnEditError("--full-layers", "[]", "name at least one layer")
    for layer in full:
        if not 0 <= layer < num_layers:
            raise AttnEditError(
                "--full-layers",
                layer,
                f"the teacher has {num_layers} layers: use 0 to {num_layers - 1}",
            )
        if full.count(layer) > 1:
            raise AttnEditError("--full-layers", layer, "name each layer once")
    windowed = len(full) < num_layers
    return AttentionEdit(
        layer_types=tuple(FULL if i in full else SLIDING for i in range(num_layers)),
        sliding_window=(plan.window or DEFAULT_WINDOW) if windowed else None,
        gate=gate_value,
    )


def head_dim_of(config: Any) -> int:
    """A teacher's head width, stated or implied."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def _latent_edit(plan: EditPlan, config: Any, gate: str | None) -> AttentionEdit:
    """Every layer latent; a rank of half the width of K and V together, at most four heads wide.

    That is 512 + 64 on Qwen3-8B and on Qwen3-30B-A3B, and never more than the teacher holds.
    """
    head_dim = head_dim_of(config)
    kv_width = config.num_key_value_heads * head_dim
    rope = plan.qk_rope_head_dim or min(DEFAULT_ROPE_WIDTH, head_dim)
    if plan.qk_norm is not None and not get_family(config.model_type).qk_norm:
        fix = f"leave it out: {config.model_type} has no QK-norm to keep"
        raise AttnEditError("--qk-norm", plan.qk_norm, fix)
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type == "longrope" and rope != head_dim:
        fix = f"use {head_dim}: the teacher's longrope has factors for rotated keys of that width"
        raise AttnEditError("--qk-rope-head-dim", rope, fix)
    if rope % 2:
        raise AttnEditError("--qk-rope-head-dim", rope, "give an even width: RoPE rotates pairs")
    if plan.v_head_dim not in (None, head_dim):
        raise AttnEditError(
            "--v-head-dim",
            plan.v_head_dim,
            f"use {head_dim}: o_proj is the teacher's, with "
            f"{config.num_attention_heads} heads x {head_dim} inputs",
        )
    if plan.init == "inherit":
        limits = {
            "kv_lora_rank": (2 * kv_width, "the teacher's keys and values have no more dimensions"),
            "qk_rope_head_dim": (head_dim, "the teacher's heads have no more dimensions"),
            "q_lora_rank": (config.hidden_size, "the hidden size is the highest rank there is"),
        }
        for name, (limit, why) in limits.items():
            value = getattr(plan, name)
            if value is not None and value > limit:
                fix = f"use at most {limit} ({why}) or --init random"
                raise AttnEditError(option_name(name), value, fix)
    return AttentionEdit(
        layer_types=(LATENT,) * config.num_hidden_layers,
        gate=gate,
        kv_lora_rank=plan.kv_lora_rank or min(4 * head_dim, kv_width),
        qk_nope_head_dim=plan.qk_nope_head_dim or head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=head_dim,
        q_lora_rank=plan.q_lora_rank,
        qk_norm=plan.qk_norm,
    )
