"""The edit of a finished run in small files, and back.

A GateSWA edit is packed as int8 differences (``attnedit edit --compact-edit``), an MLA edit as it
is saved. The file is then cut: ``cat edit.safetensors.*`` is the edit that ``attnedit edit
--from-edit`` takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from training.export import EDIT_FILE
from training.files import atomic_folder, read_json, sha256_of, write_json
from training.models import student_config
from vllm_attnedit.edit import apply_edit, compact_edit, save_edit
from vllm_attnedit.errors import AttnEditError

MANIFEST = "manifest.json"


def pack(teacher: str, model: Path, out: Path, limit: int) -> None:
    """Write the edit of a trained model in files of at most ``limit`` bytes.

    Args:
        teacher: that the model was edited from.
        model: its folder.
        out: folder to make.
        limit: bytes.

    Raises:
        AttnEditError: if the model trained more than attention, or the disk cannot take it.
    """
    compact = student_config(str(model)).sliding_window is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        file = Path(scratch) / EDIT_FILE
        save_edit(model, file)
        if compact:
            small = Path(scratch) / "compact.safetensors"
            compact_edit(teacher, file, small)
            file = small
        with atomic_folder(out, MANIFEST) as folder:
            pieces = _cut(file, folder, limit)
            about = {"bytes": file.stat().st_size, "sha256": sha256_of(file), "pieces": pieces}
            write_json(folder / MANIFEST, {"compact": compact, **about})


def unpack(teacher: str, packed: Path, model: Path) -> None:
    """Make the model of a packed edit again.

    Raises:
        AttnEditError: if a piece is missing or damaged, or belongs to another teacher.
    """
    about = read_json(packed / MANIFEST, "packed edit")
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=f".{model.name}.") as scratch:
        file = Path(scratch) / EDIT_FILE
        with file.open("wb") as whole:
            for piece in about["pieces"]:
                try:
                    whole.write((packed / piece).read_bytes())
                except OSError as error:
                    fix = "copy the whole folder again"
                    raise AttnEditError(str(packed / piece), error.strerror, fix) from error
        if sha256_of(file) != about["sha256"]:
            raise AttnEditError(str(packed), "its pieces are damaged", "copy them again")
        apply_edit(teacher, file, model)


def _cut(file: Path, folder: Path, limit: int) -> list[str]:
    pieces: list[str] = []
    with file.open("rb") as whole:
        while block := whole.read(limit):
            pieces.append(f"{EDIT_FILE}.{len(pieces):03d}")
            (folder / pieces[-1]).write_bytes(block)
    return pieces


def main() -> None:
    """``python -m benchmarks.training.packing pack|unpack TEACHER FROM TO``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.packing")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("teacher")
    parser.add_argument("source", type=Path, metavar="FROM", help="the model, or the packed edit")
    parser.add_argument("out", type=Path, metavar="TO")
    parser.add_argument("--parts-mb", type=float, default=15.5, help="MiB that no file exceeds")
    asked = parser.parse_args()
    try:
        if asked.action == "pack":
            pack(asked.teacher, asked.source, asked.out, int(asked.parts_mb * (1 << 20)))
        else:
            unpack(asked.teacher, asked.source, asked.out)
    except AttnEditError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
