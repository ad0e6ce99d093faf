"""Which devices torch and Triton see, and whether torchvision fits this torch."""

from __future__ import annotations

import json
import subprocess
from importlib import import_module
from typing import Any


def main() -> None:
    """Print what was found; a part that fails holds an ``error`` instead."""
    import torch

    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "cuda_build": torch.version.cuda,
                "cuda": _accelerators("cuda", torch.cuda),
                "npu": _npus(torch),
                "triton": _triton(),
                "torchvision": _torchvision(),
            }
        )
    )


def _accelerators(kind: str, api: Any) -> list[dict[str, Any]]:
    if not api.is_available():
        return []
    devices = []
    for index in range(api.device_count()):
        device = {"name": api.get_device_name(index), "bf16": bool(api.is_bf16_supported())}
        if kind == "cuda":
            device["capability"] = list(api.get_device_capability(index))
        devices.append(device)
    return devices


def _npus(torch: Any) -> list[dict[str, Any]] | dict[str, str]:
    try:
        import_module("torch_npu")
    except ModuleNotFoundError:
        return []
    except (ImportError, OSError, RuntimeError) as error:
        return _error(error)
    return _accelerators("npu", torch.npu)


def _triton() -> dict[str, Any] | None:
    try:
        triton = import_module("triton")
        driver = import_module("triton.runtime.driver").driver
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        return _error(error)
    try:
        target = driver.active.get_current_target().backend
    except (RuntimeError, OSError, subprocess.SubprocessError):
        target = None  # "0 active drivers", or a stub that does not compile
    return {"version": triton.__version__, "driver": target}


def _torchvision() -> dict[str, Any] | None:
    try:
        return {"version": import_module("torchvision").__version__}
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return _error(error)


def _error(error: Exception) -> dict[str, str]:
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


if __name__ == "__main__":
    main()
