"""Kernels lowered for an Ascend 910B without one: Triton to linalg, linalg to HIVM.

Triton for Ascend does the first step; ``bishengir-compile`` the second, up to the code generator,
which comes with CANN alone: in its place stands a program that accepts everything. By then buffers
are planned, so that on-chip memory that does not suffice is reported, and accesses that became
loops over single elements can be counted.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

CHIP = "Ascend910B1"
#: Cores that vector kernels and mixed kernels run on.
VECTOR_CORES, CUBE_CORES = 40, 20
#: Longest name that CANN's runtime takes.
MAX_NAME = 49

_FAKE_CODE_GENERATOR = """#!/bin/sh
[ "$1" = --version ] && { echo hivmc 1.2.0; exit 0; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done
"""


def signature(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments: pointers to bfloat16 unless named, floats by name."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            types[name] = pointers.get(name, "*bf16")
        else:
            types[name] = "fp32" if name in ("scale", "eps") else "i32"
    return types


def to_linalg(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> str:
    """The kernel as linalg on tensors and buffers, in MLIR's text form."""
    target = GPUTarget("npu", CHIP, 0)
    backend = make_backend(target)
    source = ASTSource(
        fn=kernel, signature=signature(kernel, constants, pointers), constants=constants
    )
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        options, backend.get_codegen_implementation(), backend.get_module_map(), context
    )
    metadata = {**options.__dict__, "target": target, "hash": "none"}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    for name in ("ttir", "ttadapter"):
        try:
            module = stages[name](module, metadata)
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.stderr.decode()[:1000]) from error
    return str(module)


@dataclass
class Hivm:
    """What the compiler made of a kernel.

    Attributes:
        log: its errors and notes; empty if there were none.
        text: the planned module.
    """

    log: str
    text: str

    @property
    def scalar_accesses(self) -> int:
        """Loads of single elements from memory, each in a loop or once a task."""
        return self.text.count("memref.load")


def compiler(name: str) -> Path:
    """A program of the package ascendnpu-ir."""
    spec = find_spec("ascendnpuir")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "bin" / name


def to_hivm(linalg: str, folder: Path) -> Hivm:
    """Compile linalg with the options that Triton for Ascend passes on for a 910B."""
    tools, stages = folder / "tools", folder / "stages"
    for created in (tools, stages):
        created.mkdir()
    (tools / "hivmc").write_text(_FAKE_CODE_GENERATOR)
    (tools / "hivmc").chmod(0o755)
    source = folder / "kernel.mlir"
    # An attribute for Triton's own launcher that the compiler does not know.
    source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
    done = subprocess.run(
        [
            compiler("bishengir-compile"),
            source,
            f"--target={CHIP}",
            "--enable-auto-multi-buffer=true",
            "--enable-auto-bind-sub-block=true",
            "--enable-hfusion-compile=true",
            "--enable-hivm-compile=true",
            "--enable-triton-kernel-compile=true",
            f"--save-temps={stages}",
            "-o",
            folder / "kernel.o",
        ],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = [
        line
        for line in (done.stderr + done.stdout).splitlines()
        if re.search(r"error|overflow|NOTE", line)
    ]
    planned = stages / "module.hivm.opt.mlir"
    if done.returncode and not told:
        told = [f"status {done.returncode}: {done.stderr[-500:]}"]
    return Hivm("\n".join(told), planned.read_text() if planned.is_file() else "")
