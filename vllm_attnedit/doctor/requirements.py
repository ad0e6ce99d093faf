"""Whether an installed package is one that this project and vLLM ask for."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from vllm_attnedit.compat import VLLM_DISTRIBUTIONS
from vllm_attnedit.doctor.host import Host

OWN_DISTRIBUTION = "vllm-attnedit"


def unmet_requirement(host: Host, package: str, *, apart_from: str | None = None) -> str | None:
    """Which requirement of ours or of vLLM's an installed ``package`` misses, in words.

    Args:
        host: this machine.
        package: name of a distribution.
        apart_from: a distribution whose word does not count.
    """
    installed = host.version(package)
    if installed is None:
        return None
    for distribution in (OWN_DISTRIBUTION, *VLLM_DISTRIBUTIONS):
        if distribution == apart_from:
            continue
        for line in host.requirements(distribution):
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) != package:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            # The local part names a build: torch 2.11.0 and 2.11.0+cpu have one ABI.
            wanted = re.sub(r"\+[\w.]+", "", str(requirement.specifier))
            if not SpecifierSet(wanted).contains(Version(installed).public, prereleases=True):
                return f"{package} {installed} is installed, {distribution} wants {wanted}"
    return None
