"""Rewrites a checkpoint for travel: small files, weights in bf16, moments in bf16 or left behind.

A run keeps full checkpoints where it runs, since only they resume bit for bit. What has to pass
through a narrow channel, say from a machine that is one's own for minutes, is made from the newest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from training.checkpoint import DTYPES, GENERATORS
from training.config import Config
from training.files import atomic_folder, write_json
from training.parts import PartsReader, indexes, write_parts
from training.resuming import STATE, read_whole

PACKED_FOLDER = "packed"


def repack(config: Config, checkpoint: Path) -> Path:
    """Write a checkpoint anew as ``checkpoint.*`` asks for; returns ``<output>/packed``.

    The result is resumed with ``checkpoint.resume: <its folder>``.

    Raises:
        AttnEditError: if the checkpoint cannot be read, or the disk cannot take the copy.
    """
    how, state = config.checkpoint, read_whole(checkpoint)
    limit = int(how.parts_mb * (1 << 20)) if how.parts_mb else None
    weights, moments = PartsReader(checkpoint, "weights-"), PartsReader(checkpoint, "optimizer-")

    def rounded() -> Iterator[tuple[str, Tensor]]:
        for name in weights:
            tensor = weights.load(name)
            yield name, tensor if name.startswith(GENERATORS) else tensor.to(DTYPES[how.weights])

    out = Path(config.output) / PACKED_FOLDER
    with atomic_folder(out, STATE) as folder:
        write_parts(folder, "weights-0", rounded(), limit)
        if how.optimizer != "none":
            kept = ((name, moments.load(name).to(DTYPES[how.optimizer])) for name in moments)
            write_parts(folder, "optimizer-0", kept, limit)
        write_json(folder / STATE, state | {"indexes": indexes(folder)})
    return out
