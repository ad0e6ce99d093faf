"""Checks of an Ascend machine, which run when the user means to serve on one."""

from __future__ import annotations

from collections.abc import Callable

from vllm_attnedit.doctor.host import Finding, Host, ProbeError
from vllm_attnedit.doctor.requirements import unmet_requirement

#: What CANN's set_env.sh sets; any of them will do.
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
VERIFIED_CHIP = "910B"


def check_cann(host: Host) -> Finding:
    """The environment of CANN is set: torch_npu finds its libraries and kernels by it."""
    for name in CANN_VARIABLES:
        if host.environ.get(name):
            return Finding("ok", f"{name} is {host.environ[name]}")
    return Finding(
        "fail",
        f"neither {' nor '.join(CANN_VARIABLES)} is set",
        "source set_env.sh of the CANN toolkit in the shell that starts vllm",
    )


def check_torch_npu(host: Host) -> Finding:
    """torch_npu is the one that vllm-ascend was built for."""
    version = host.version("torch-npu")
    if version is None:
        return Finding("fail", "torch_npu is not installed", "install vllm-ascend, which brings it")
    unmet = unmet_requirement(host, "torch-npu")
    if unmet:
        return Finding("fail", unmet, "install vllm-ascend again together with what it pins")
    return Finding("ok", f"torch_npu {version}")


def check_chip(host: Host) -> Finding:
    """The chip is of the kind that kernels and limits were checked for."""
    if isinstance(host.devices, ProbeError) or not isinstance(host.devices["npu"], list):
        return Finding("warn", "not checked: torch_npu does not start", "mend that first")
    names = sorted({item["name"] for item in host.devices["npu"]})
    if names and all(VERIFIED_CHIP in name for name in names):
        return Finding("ok", ", ".join(names))
    return Finding(
        "warn",
        f"{', '.join(names) or 'no chip'}: limits and kernels were checked for {VERIFIED_CHIP}",
        f"serve on an Ascend {VERIFIED_CHIP}, or compare answers with the reference first: "
        "attnedit verify",
    )


def check_ascend_triton(host: Host) -> Finding:
    """Triton for Ascend. vllm-ascend's runner uses it; this project's operators do without."""
    found = None if isinstance(host.devices, ProbeError) else host.devices["triton"]
    if found and found.get("driver") == "npu":
        return Finding("ok", f"Triton {found['version']} with an npu driver")
    return Finding(
        "warn",
        "Triton for Ascend finds no driver: the gate runs as plain torch operators",
        "install triton-ascend, and no other package called triton",
    )


def check_band(host: Host) -> Finding:
    """The fused attention operator keeps the keys that this project's windows rest on."""
    try:
        answer = host.probe("ascend")
    except ProbeError as error:
        return Finding(
            "fail",
            f"the fused attention operator does not run: {error}",
            "mend what failed above; if nothing did, update CANN to the release that "
            "vllm-ascend names",
        )
    wrong = [name for name in ("dense", "paged") if not answer[name]["right"]]
    if not wrong:
        return Finding("ok", f"a window of {answer['window']} is {answer['window']} keys")
    seen = ", ".join(f"{name} {answer[name]['keys']} keys" for name in wrong)
    return Finding(
        "fail",
        f"a window of {answer['window']} is not {answer['window']} keys: {seen}",
        "report this with the version of CANN, and do not serve window layers: answers are wrong",
    )


ASCEND_CHECKS: tuple[tuple[str, Callable[[Host], Finding]], ...] = (
    ("CANN", check_cann),
    ("torch_npu", check_torch_npu),
    ("chip", check_chip),
    ("Triton for Ascend", check_ascend_triton),
    ("window of the fused attention", check_band),
)
