"""The one schema of an edited checkpoint: ``AttnEditConfig``, and the edit it carries.

An edited model is its teacher with ``self_attn`` replaced layer by layer. So its configuration is
the teacher's own fields at top level plus ``base_model_type`` (the teacher's ``model_type``),
``attention_edit`` (below) and ``provenance``. The format is documented in ``docs/checkpoint.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

# Not from the package's root: that would import the Auto classes, whose import waits for this
# module to register it (see vllm_attnedit.autoclasses).
from transformers.configuration_utils import PreTrainedConfig

from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import Family, get_family

MODEL_TYPE = "attnedit"
ARCHITECTURE = "AttnEditForCausalLM"
FORMAT_VERSION = 1

FULL, SLIDING, LATENT = "full_attention", "sliding_attention", "latent_attention"
LAYER_TYPES = (FULL, SLIDING, LATENT)
GATES = ("headwise", "elementwise", None)
PER_HEAD = "per_head"

_LATENT_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# The teacher's own statements about windows: the edit replaces them, so none is kept.
_REPLACED_BY_EDIT = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
_NOT_OF_TEACHER = ("model_type", "architectures", "transformers_version", "auto_map")


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


class AttnEditConfig(PreTrainedConfig):
    """Configuration of an edited model of any family.

    Args:
        base_model_type: the teacher's ``model_type``.
        attention_edit: the edit, as an :class:`AttentionEdit` or its JSON object; the default is
            the unedited teacher (full attention everywhere, no gate).
        provenance: where the weights come from (teacher, commit, versions, stage, tokens seen).
        **teacher_fields: the teacher's configuration; what is missing takes the family's default.

    Raises:
        AttnEditError: for an unsupported family or an edit that does not fit the teacher.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]
    # Mixture-of-experts teachers store one name and read the other.
    attribute_map = {"num_experts": "num_local_experts"}

    def __init__(
        self,
        base_model_type: str = "qwen3",
        attention_edit: AttentionEdit | dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        **teacher_fields: Any,
    ) -> None:
        family = get_family(base_model_type)
        kept = {
            k: v
            for k, v in teacher_fields.items()
            if k not in _REPLACED_BY_EDIT and k not in _NOT_OF_TEACHER
        }
        # The family's own class fills in defaults and normalises old spellings (rope_theta, ...).
        teacher = _teacher_class(base_model_type)(**kept)
        values = {
            k: v
            for k, v in teacher.to_dict().items()
            if k not in _REPLACED_BY_EDIT and k not in _NOT_OF_TEACHER
        }
        if values.get("head_dim") is None:
            values["head_dim"] = teacher.hidden_size // teacher.num_attention_heads
        if attention_edit is None:
            attention_edit = AttentionEdit(layer_types=(FULL,) * teacher.num_hidden_layers)
        elif not isinstance(attention_edit, AttentionEdit):
            attention_edit = AttentionEdit.from_dict(attention_edit)
        if attention_edit.per_head_norm and not family.qk_norm:
            fix = f"leave it out: {family.model_type} has no QK-norm to keep"
            raise AttnEditError("attention_edit.qk_norm", PER_HEAD, fix)
        check_fit(attention_edit, **{k: values[k] for k in _FIT_FIELDS})
        super().__init__(
            architectures=[ARCHITECTURE],
            attn_implementation=teacher_fields.get("attn_implementation"),
            base_model_type=family.model_type,
            attention_edit=attention_edit.to_dict(),
            provenance=dict(provenance or {}),
            **values,
        )

    @property
    def family(self) -> Family:
        return get_family(self.base_model_type)

    @property
    def edit(self) -> AttentionEdit:
        """The validated edit."""
        return AttentionEdit.from_dict(self.attention_edit)

    # transformers' caches and masks, and vLLM, look for these two names. They follow from the edit
    # and are never stored, so that they cannot contradict it. To them a latent layer is a full one:
    # it keeps one entry for every token.
    @property
    def layer_types(self) -> list[str]:
        types = self.__dict__.get("attention_edit", {}).get("layer_types", [])
        return [SLIDING if t == SLIDING else FULL for t in types]

    @property
    def sliding_window(self) -> int | None:
        return self.__dict__.get("attention_edit", {}).get("sliding_window")

    # vLLM's MLA path looks for these. Derived, as above.
    @property
    def kv_lora_rank(self) -> int | None:
        return self._latent("kv_lora_rank")

    @property
    def q_lora_rank(self) -> int | None:
        return self._latent("q_lora_rank")

    @property
    def qk_nope_head_dim(self) -> int | None:
        return self._latent("qk_nope_head_dim")

    @property
    def qk_rope_head_dim(self) -> int | None:
        return self._latent("qk_rope_head_dim")

    @property
    def v_head_dim(self) -> int | None:
        return self._latent("v_head_dim")

    def _latent(self, name: str) -> int | None:
        value: int | None = self.__dict__.get("attention_edit", {}).get(name)
        return value

    @property
    def qkv_bias(self) -> bool:
        return self.family.qkv_bias(self)

    @property
    def o_bias(self) -> bool:
        return self.family.o_bias(self)

    @property
    def gate_size(self) -> int:
        """Gate logits a token and layer over all heads; 0 without a gate."""
        gate = self.attention_edit["gate"]
        if gate is None:
            return 0
        heads = self.num_attention_heads
        return heads if gate == "headwise" else heads * self.head_dim

    def teacher_config(self) -> PreTrainedConfig:
        """The teacher's configuration: a new object of the family's own class."""
        skip = ("base_model_type", "attention_edit", "provenance", *_NOT_OF_TEACHER)
        kept = {k: v for k, v in self.to_dict().items() if k not in skip}
        config = _teacher_class(self.base_model_type)(**kept)
        config._attn_implementation = self._attn_implementation
        return config


def _teacher_class(model_type: str) -> type[PreTrainedConfig]:
    from transformers import CONFIG_MAPPING

    cls: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return cls


_FIT_FIELDS = ("num_hidden_layers", "num_attention_heads", "head_dim")


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
