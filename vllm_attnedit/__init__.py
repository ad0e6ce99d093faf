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
    """Register the edited architecture with vLLM: the ``vllm.general_plugins`` entry point.

    Called once in every vLLM process, idempotent, touches no device.

    Raises:
        AttnEditError: if the installed vLLM is outside the supported window.
    """
    from vllm_attnedit.compat import check_vllm_version

    check_vllm_version()
    from vllm_attnedit.plugin import register_with_vllm

    register_with_vllm()
