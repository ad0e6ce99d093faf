"""Files and folders that exist whole or not at all, whatever kills the process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_attnedit.errors import AttnEditError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_of(folder: Path) -> Path:
    """Where a folder grows before it gets its name; the same for every process of a run."""
    return folder.parent / f".{folder.name}.partial"


def publish(folder: Path) -> None:
    """Flush the temporary folder of ``folder`` and give it its name, in place of an older one."""
    temporary = temporary_of(folder)
    for file in sorted(temporary.rglob("*")):
        fsync(file)
    fsync(temporary)
    # A rename cannot replace a folder that has content: the old one steps aside first.
    if folder.exists():
        aside = folder.parent / f".{folder.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(temporary, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, folder)
    fsync(folder.parent)


@contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turn the disk's refusals into one line.

    Raises:
        AttnEditError: for a full disk, or one that cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _system_error(error)
        if number is None and isinstance(error, SafetensorError):
            raise
        if number in _FULL:
            fix = "free space and start again: whatever was complete before is untouched"
        else:
            fix = "choose a folder that can be written"
        reason = os.strerror(number) if number is not None else error
        raise AttnEditError(str(what), reason, fix) from error


def _system_error(error: SafetensorError) -> int | None:
    """The system's error number: safetensors writes files by itself, and gives it as text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def check_replaceable(folder: Path, marker: str) -> None:
    """Refuse to put a folder in the place of one that was not made here.

    Args:
        folder: that is to be made.
        marker: a file that every folder of its kind has.

    Raises:
        AttnEditError: if it exists, is not empty and has no such file.
    """
    if folder.is_dir() and not (folder / marker).exists() and any(folder.iterdir()):
        fix = f"name a new or an empty folder: this one holds other files, and no {marker}"
        raise AttnEditError("folder", folder, fix)


@contextmanager
def atomic_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends well, and vanishes otherwise.

    Args:
        folder: to make, or to make anew.
        marker: a file that the block writes and by which a folder of its kind is known.

    Raises:
        AttnEditError: for a full disk, one that cannot be written, or a folder of somebody else.
    """
    check_replaceable(folder, marker)
    temporary = temporary_of(folder)
    with disk_errors(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            publish(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def read_json(path: Path, field: str) -> Any:
    """A JSON file.

    Raises:
        AttnEditError: naming ``field``, if it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AttnEditError(field, path, f"give a readable file ({error.strerror})") from error
    except ValueError as error:
        raise AttnEditError(field, path, f"it is no JSON ({error}): make it again") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
