"""The one schema of an edited checkpoint: ``AttnEditConfig``, and the edit it carries.

An edited model is its teacher with ``self_attn`` replaced layer by layer. So its configuration is
the teacher's own fields at top level plus ``base_model_type`` (the teacher's ``model_type``),
``attention_edit`` (:mod:`vllm_attnedit.attention_edit`, whose names are offered here too) and
``provenance``. The format is documented in ``docs/checkpoint.md``.
"""

from __future__ import annotations

import json
from typing import Any

# Not from the package's root: that would import the Auto classes, whose import waits for this
# module to register it (see vllm_attnedit.autoclasses).
from transformers.configuration_utils import PreTrainedConfig

from vllm_attnedit.attention_edit import (
    FULL,
    LATENT,
    PER_HEAD,
    SLIDING,
    AttentionEdit,
    check_fit,
)
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import Family, get_family

__all__ = [
    "ARCHITECTURE",
    "FULL",
    "LATENT",
    "MODEL_TYPE",
    "PER_HEAD",
    "SLIDING",
    "AttentionEdit",
    "AttnEditConfig",
]

MODEL_TYPE = "attnedit"
ARCHITECTURE = "AttnEditForCausalLM"

# The teacher's own statements about windows: the edit replaces them, so none is kept.
_REPLACED_BY_EDIT = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
_NOT_OF_TEACHER = ("model_type", "architectures", "transformers_version", "auto_map")
_FIT_FIELDS = ("num_hidden_layers", "num_attention_heads", "head_dim")


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
        if not isinstance(provenance or {}, dict):
            raise AttnEditError("provenance", provenance, "give an object, or leave it out")
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

    def __setattr__(self, name: str, value: Any) -> None:
        derived = getattr(type(self), name, None)
        if isinstance(derived, property) and derived.fset is None:
            fix = "leave it alone: it follows from attention_edit, so edit the teacher again"
            raise AttnEditError(name, value, fix)
        super().__setattr__(name, value)

    def uuid(self) -> str:
        """Everything that compiled code may depend on, as text: what vLLM caches such code by.

        vLLM asks for it by this name. By itself it would look at the dataclass fields of
        transformers' base class alone, to which two edits of a teacher are the same.
        """
        values = self.to_dict()
        for name in ("provenance", "transformers_version", "_name_or_path"):
            values.pop(name, None)
        return json.dumps(values, sort_keys=True, default=str)

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
