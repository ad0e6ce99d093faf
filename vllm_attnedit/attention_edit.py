"""The ``attention_edit`` object of an edited checkpoint: which attention stands in which layer.

Needs neither transformers nor torch. The format is documented in ``docs/checkpoint.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_attnedit.errors import AttnEditError

FORMAT_VERSION = 1

FULL, SLIDING, LATENT = "full_attention", "sliding_attention", "latent_attention"
LAYER_TYPES = (FULL, SLIDING, LATENT)
GATES = ("headwise", "elementwise", None)
PER_HEAD = "per_head"

_LATENT_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, kw_only=True)
class AttentionEdit:
    """Which attention stands in which layer. Validated on construction.

    Attributes:
        layer_types: one of ``full_attention``, ``sliding_attention``, ``latent_attention`` a layer.
        sliding_window: keys a window layer sees, the query's own included (>= 1).
        gate: sigmoid gate on the attention output before ``o_proj``, on every layer: one logit a
            head, one an element, or no gate.
        kv_lora_rank: width of the cached latent of a latent layer (shared by all heads).
        qk_nope_head_dim: per-head query/key width without position.
        qk_rope_head_dim: width of the decoupled RoPE key (shared by all heads); even.
        v_head_dim: per-head value width; heads x v_head_dim is the input width of ``o_proj``.
        q_lora_rank: rank of the query projection of a latent layer; ``None`` for a plain one.
        qk_norm: ``per_head`` keeps the teacher's per-head QK-norm on latent layers, exactly; the
            default ``None`` has the norm of the latent instead.
        version: of the format.

    Raises:
        AttnEditError: naming ``attention_edit.<field>``, the value and the fix.
    """

    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    gate: str | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_lora_rank: int | None = None
    qk_norm: str | None = None
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.version, int) or not 1 <= self.version <= FORMAT_VERSION:
            fix = f"upgrade vllm-attnedit, which knows versions up to {FORMAT_VERSION}"
            raise self._error("version", fix)
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if not self.layer_types:
            raise self._error("layer_types", "give one type per layer")
        for layer_type in self.layer_types:
            if layer_type not in LAYER_TYPES:
                raise AttnEditError(
                    "attention_edit.layer_types", layer_type, f"use one of {', '.join(LAYER_TYPES)}"
                )
        if self.gate not in GATES:
            raise self._error("gate", "use 'headwise', 'elementwise' or null")
        if SLIDING in self.layer_types:
            self._require_positive("sliding_window")
        elif self.sliding_window is not None:
            raise self._error(
                "sliding_window", "leave it out: no layer is a sliding_attention layer"
            )
        for name in _LATENT_DIMS:
            if LATENT in self.layer_types:
                self._require_positive(name)
            elif getattr(self, name) is not None:
                raise self._error(name, "leave it out: no layer is a latent_attention layer")
        if self.q_lora_rank is not None:
            if LATENT not in self.layer_types:
                raise self._error(
                    "q_lora_rank", "leave it out: no layer is a latent_attention layer"
                )
            self._require_positive("q_lora_rank")
        if self.qk_norm not in (PER_HEAD, None):
            raise self._error("qk_norm", f"use '{PER_HEAD}' or leave it out")
        if self.per_head_norm:
            if LATENT not in self.layer_types:
                raise self._error("qk_norm", "leave it out: no layer is a latent_attention layer")
            assert self.kv_lora_rank is not None
            if self.kv_lora_rank % 2:  # float32 lies behind the latent, in its dtype's units
                raise self._error("kv_lora_rank", "give an even rank, which qk_norm asks for")
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise self._error("qk_rope_head_dim", "give an even width: RoPE rotates pairs")

    def _error(self, name: str, fix: str) -> AttnEditError:
        return AttnEditError(f"attention_edit.{name}", getattr(self, name), fix)

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(name, "give an integer >= 1")

    @classmethod
    def from_dict(cls, data: object) -> AttentionEdit:
        """Parse the ``attention_edit`` object of a ``config.json``."""
        if not isinstance(data, dict):
            raise AttnEditError("attention_edit", data, "give an object with 'layer_types'")
        # First, so that a file from the future is not blamed for its unknown fields.
        version = data.get("version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            cls(layer_types=(FULL,), version=version)
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise AttnEditError(
                    "attention_edit",
                    name,
                    f"remove this field; known are {', '.join(sorted(known))}",
                )
        if not isinstance(data.get("layer_types"), list | tuple):
            raise AttnEditError(
                "attention_edit.layer_types", data.get("layer_types"), "give one type per layer"
            )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; fields that do not apply are left out."""
        data = {k: v for k, v in asdict(self).items() if v is not None or k == "gate"}
        return {"version": data.pop("version"), **data, "layer_types": list(self.layer_types)}

    @property
    def per_head_norm(self) -> bool:
        """Whether latent layers norm queries and keys by head, and not the latent."""
        return self.qk_norm == PER_HEAD

    @property
    def qk_head_dim(self) -> int:
        """Per-head query/key width of a latent layer."""
        assert self.qk_nope_head_dim is not None and self.qk_rope_head_dim is not None
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def check_fit(
    edit: AttentionEdit, *, num_hidden_layers: int, num_attention_heads: int, head_dim: int
) -> None:
    """Raise unless ``edit`` fits a teacher of these dimensions."""
    if len(edit.layer_types) != num_hidden_layers:
        raise AttnEditError(
            "attention_edit.layer_types",
            f"{len(edit.layer_types)} entries",
            f"give {num_hidden_layers}, one per layer (num_hidden_layers)",
        )
    if edit.v_head_dim is not None and edit.v_head_dim != head_dim:
        raise AttnEditError(
            "attention_edit.v_head_dim",
            edit.v_head_dim,
            f"use {head_dim}: {num_attention_heads} heads x v_head_dim must match o_proj's "
            f"{num_attention_heads * head_dim} inputs, which are the teacher's",
        )
