"""Makes transformers' Auto classes know the edited model, without importing them early.

``import vllm_attnedit`` must stay light (no torch), yet afterwards ``AutoModelForCausalLM`` has to
load an edited checkpoint with no ``trust_remote_code``. transformers offers ``register`` for that
but no entry point, and importing its Auto modules pulls in torch. So the registration is deferred
to the moment somebody imports them: a finder on ``sys.meta_path`` runs it right after the module's
own code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
_MODEL_MODULE = "transformers.models.auto.modeling_auto"


def register_config() -> None:
    """Register the configuration with ``AutoConfig``. Idempotent; imports no model code."""
    from transformers import AutoConfig

    from vllm_attnedit.config import MODEL_TYPE, AttnEditConfig

    AutoConfig.register(MODEL_TYPE, AttnEditConfig, exist_ok=True)


def register_models() -> None:
    """Register the reference model with ``AutoModel`` and ``AutoModelForCausalLM``. Idempotent."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from vllm_attnedit.config import MODEL_TYPE, AttnEditConfig
    from vllm_attnedit.hf.modeling import AttnEditForCausalLM, AttnEditModel

    register_config()
    AutoModel.register(AttnEditConfig, AttnEditModel, exist_ok=True)
    AutoModelForCausalLM.register(AttnEditConfig, AttnEditForCausalLM, exist_ok=True)
    # Checkpoints name each expert; transformers holds them stacked. Same rule as for the teacher.
    register_checkpoint_conversion_mapping(
        MODEL_TYPE, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
    )


_ON_IMPORT = {_CONFIG_MODULE: register_config, _MODEL_MODULE: register_models}


class _RegisteringLoader(Loader):
    """Runs a module's own loader, then the registration that waits for it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _ON_IMPORT[module.__name__]()


class _RegisteringFinder(MetaPathFinder):
    """Finds exactly the two Auto modules, by asking the other finders, and wraps their loader."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ON_IMPORT or fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register now what transformers has already imported, and the rest when it is imported."""
    for name, register in _ON_IMPORT.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
