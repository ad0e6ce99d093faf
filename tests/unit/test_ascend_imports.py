"""torch_npu and vllm_ascend are imported on their platform only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NPU_PACKAGES = {"torch_npu", "vllm_ascend"}
#: Modules that run on an NPU's platform alone.
NPU_MODULES = {"vllm_attnedit/backends/gateswa_ascend.py"}


def sources() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("vllm_attnedit", "training", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_only_the_npu_modules_import_them():
    found = {
        name
        for name, tree in sources().items()
        if any(module.split(".")[0] in NPU_PACKAGES for module in imported(tree))
    }
    assert found == NPU_MODULES


def test_nobody_imports_those_while_being_imported():
    """Functions may, after asking for the platform; a module's own statements may not."""
    modules = {name.removesuffix(".py").replace("/", ".") for name in NPU_MODULES}
    for name, tree in sources().items():
        outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not set().union(*(imported(node) for node in outside)) & modules, name
