"""Output that exists whole or not at all.

Everything goes into a temporary neighbour of the final folder or file, is flushed to disk, and is
renamed at the end. Whatever goes wrong, a full disk included, the neighbour is removed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_attnedit.errors import AttnEditError

_RESERVE = 16 << 20
"""Bytes left for the tokenizer and configuration when the free space is checked."""


def check_output(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        AttnEditError: if it is a file or not empty.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise AttnEditError("OUT", out, "name a new or an empty folder: this one is not empty")
        if out.resolve().is_mount():
            raise AttnEditError("OUT", out, "name a folder inside it: this is a mount point")
    elif out.exists() or out.is_symlink():
        raise AttnEditError("OUT", out, "name a folder: this is a file")


def _first_missing(path: Path) -> Path | None:
    missing = None
    while not path.exists():
        missing, path = path, path.parent
    return missing


@contextmanager
def output_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well, and vanishes otherwise.

    Args:
        out: the final folder; missing parents are made, and removed again on failure.
        nbytes: of weights to come, for the check of free space.

    Raises:
        AttnEditError: if the disk is too small, fills up, or cannot be written.
    """
    check_output(out)
    out = out.resolve()
    made = _first_missing(out.parent)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    done = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        _check_space(out, nbytes)
        partial.mkdir()
        yield partial
        for file in sorted(partial.rglob("*")):
            _fsync(file)
        _fsync(partial)
        os.rename(partial, out)
        done = True
        _fsync(out.parent)
    except OSError as error:
        raise _as_user_error(error, out) from error
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)
            if made is not None:
                _remove_empty(out.parent, made)


@contextmanager
def output_file(out: Path, nbytes: int) -> Iterator[Path]:
    """The same for a single file, in a folder that exists. Yields the temporary path.

    Raises:
        AttnEditError: if the file exists, or the disk is too small, fills up, or cannot be written.
    """
    if out.exists():
        raise AttnEditError("OUT", out, "name a new file: this one exists")
    out = out.resolve()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        _remove_abandoned(out)
        _check_space(out, nbytes)
        yield partial
        _fsync(partial)
        os.rename(partial, out)
        _fsync(out.parent)
    except OSError as error:
        raise _as_user_error(error, out) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_space(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < nbytes + _RESERVE:
        needed = (nbytes + _RESERVE) / 1e9
        fix = f"free space or choose another disk: {needed:.2f} GB are needed"
        raise AttnEditError("OUT", f"{out}: {free / 1e9:.2f} GB free", fix)


def _remove_empty(folder: Path, last: Path) -> None:
    """Remove ``folder`` and its parents up to ``last``, all made here, while they are empty."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:
            return
        if path == last:
            return


def _remove_abandoned(out: Path) -> None:
    """Remove what killed runs have left: partial output whose process is gone, or had this one's
    number, as processes in containers do."""
    prefix = f".{out.name}.partial-"
    for left in out.parent.iterdir():
        pid = left.name.removeprefix(prefix)
        if left.name == pid or not pid.isdigit():
            continue
        if int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _as_user_error(error: OSError, out: Path) -> AttnEditError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free space or choose another disk; nothing was left behind"
        return AttnEditError("OUT", f"{out}: {error.strerror}", fix)
    fix = "choose a folder that can be written, or mend the file"
    return AttnEditError(str(error.filename or out), error.strerror, fix)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
