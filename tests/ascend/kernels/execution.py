"""The linalg that Triton for Ascend makes of a kernel, run on this machine's CPU.

It is what ``bishengir-compile`` gets; everything that Triton for Ascend decided is in it. MLIR's
own passes turn it into loops, Triton's LLVM into machine code.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from triton._C.libtriton import ir, llvm

from tests.ascend.kernels.lowering import compiler

TRIPLE = "x86_64-unknown-linux-gnu"
PASSES = (
    "--linalg-generalize-named-ops",
    "--convert-elementwise-to-linalg",
    "--convert-tensor-to-linalg",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--convert-linalg-to-loops",
    "--convert-bufferization-to-memref",
    "--convert-scf-to-cf",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-math-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-arith-to-llvm",
    "--convert-index-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)


def compile_for_cpu(linalg: str, folder: Path) -> ctypes.CDLL:
    """Machine code of a lowered kernel, loaded."""
    source, lowered = folder / "cpu.mlir", folder / "cpu.llvm.mlir"
    source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
    subprocess.run([compiler("bishengir-opt"), source, *PASSES, "-o", lowered], check=True)
    context = ir.context()
    ir.load_dialects(context)
    module = ir.parse_mlir_module(str(lowered), context)
    llvm.init_targets()
    translated = llvm.to_module(module, llvm.context())
    llvm.optimize_module(translated, llvm.OPTIMIZE_O2)
    code = llvm.translate_to_asm(str(translated), TRIPLE, "x86-64", "", [], False, True)
    binary, library = folder / "kernel.o", folder / "kernel.so"
    binary.write_bytes(code)
    cc = sysconfig.get_config_var("CC").split()[0]
    runtime = Path(__file__).with_name("runtime.c")
    subprocess.run(
        [cc, "-shared", "-fPIC", "-O1", "-o", library, binary, runtime, "-lm"], check=True
    )
    return ctypes.CDLL(str(library))


def launcher(kernel: Any, library: ctypes.CDLL, constants: dict[str, Any]) -> Callable[..., None]:
    """``launch(cores, **arguments)``: the kernel, one program after the other."""
    function = getattr(library, kernel.fn.__name__)
    function.restype = None
    names = [name for name in kernel.arg_names if name not in constants]

    def launch(cores: int, **arguments: Any) -> None:
        assert set(arguments) == set(names)
        # The compiler's own two come first: a lock and a workspace, which no kernel here needs.
        passed = [*_memref(0), *_memref(0)]
        for name in names:
            value = arguments[name]
            if isinstance(value, Tensor):
                passed += _memref(value.data_ptr())
            elif isinstance(value, float):
                passed.append(ctypes.c_float(value))
            else:
                passed.append(ctypes.c_int32(value))
        for core in range(cores):
            grid = [ctypes.c_int32(x) for x in (cores, 1, 1, core, 0, 0)]
            function(*passed, *grid)

    return launch


def _memref(address: int) -> list[Any]:
    """An unbounded one-dimensional buffer: allocated, aligned, offset, size, stride."""
    return [
        ctypes.c_void_p(address),
        ctypes.c_void_p(address),
        ctypes.c_int64(0),
        ctypes.c_int64(1 << 40),
        ctypes.c_int64(1),
    ]
