"""Where an edited checkpoint comes from, for its ``config.json``."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vllm_attnedit
from vllm_attnedit.edit.layout import is_attention
from vllm_attnedit.edit.patterns import EditPlan
from vllm_attnedit.edit.store import TensorStore

_PACKAGES = ("transformers", "safetensors", "gguf", "numpy")
_SAMPLED = 1024
"""Elements of each tensor that a fingerprint covers."""


def package_versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    found = {"vllm-attnedit": vllm_attnedit.__version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``-dirty`` with local changes, or None.

    A copy without git is told its commit by the environment variable ``ATTNEDIT_COMMIT``.
    """
    if named := os.environ.get("ATTNEDIT_COMMIT"):
        return named
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into an environment that lies in somebody else's repository, this file is untracked.
    if not git("ls-files", here.name):
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]))
    return f"{commit}-dirty" if commit and changed else commit


def fingerprint(
    store: TensorStore,
    names: list[str],
    dtypes: dict[str, torch.dtype] | None = None,
    *,
    attention: bool = False,
) -> str:
    """SHA-256 over a sample of every tensor beside attention: what an edit leaves alone.

    Args:
        store: of the teacher, or of a model that was edited from it.
        names: the tensors of the checkpoint.
        dtypes: in which the edited model holds them, if not in the stored ones.
        attention: take attention's tensors too: what tells one teacher from another.

    Two checkpoints with one fingerprint have the same names, shapes, dtypes and the same first
    thousand elements of every such tensor. Training any of them changes it.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        if is_attention(name) and not attention:
            continue
        info = store.tensors[name]
        dtype = dtypes[name] if dtypes else info.dtype
        sample = store.head(name, _SAMPLED)[:_SAMPLED].to(dtype).contiguous()
        digest.update(f"{name} {info.shape} {dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def edit_provenance(
    *,
    teacher: str,
    revision: str | None,
    plan: EditPlan,
    teacher_fingerprint: str,
    calibration: dict[str, Any] | None,
    energy_kept: dict[str, Any] | None,
) -> dict[str, Any]:
    """The ``provenance`` of a freshly edited checkpoint."""
    values: dict[str, Any] = {
        "stage": "edit",
        "teacher": teacher,
        "revision": revision,
        "target": plan.target,
        "init": plan.init,
        "seed": plan.seed,
        "tokens_seen": 0,
        "calibration": calibration,
        "energy_kept": energy_kept,
        "teacher_fingerprint": teacher_fingerprint,
        "commit": git_commit(),
        "versions": package_versions(),
    }
    return {name: value for name, value in values.items() if value is not None}
