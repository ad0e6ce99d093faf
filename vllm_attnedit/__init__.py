"""vllm-attnedit: serve and train models whose attention was edited to GateSWA or MLA.

Importing this package imports neither torch nor vLLM. It makes transformers' Auto classes able to
load edited checkpoints; vLLM calls :func:`register` through its plugin entry point.
"""

from __future__ import annotations

from vllm_attnedit.autoclasses import register_when_imported
from vllm_attnedit.errors import AttnEditError

__all__ = ["AttnEditError", "__version__", "register"]
__version__ = "0.1.0"

register_when_imported()


def register() -> None:
    """Register edited models with vLLM: the ``vllm.general_plugins`` entry point.

    Called in every vLLM process; idempotent, touches no device. With a vLLM outside the supported
    window it logs one error line and registers nothing.
    """
    from vllm_attnedit.compat import host_is_supported

    if host_is_supported():
        from vllm_attnedit.plugin import register_with_vllm

        register_with_vllm()
