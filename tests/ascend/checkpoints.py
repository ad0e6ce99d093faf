"""Two small random checkpoints of the widths that an Ascend takes, for a first run on the device.

python -m tests.ascend.checkpoints FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

MLA_WIDTHS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
HEADS = {"head_dim": 128, "num_attention_heads": 4}


def write(folder: Path) -> None:
    """``gateswa``, three window layers of 128 keys and a full one, and ``mla``, both gated."""
    window = tiny_edit("gateswa", window=128, gate="elementwise")
    latent = tiny_edit("mla", gate="headwise", **MLA_WIDTHS)
    for name, family, edit, kv_heads in (
        ("gateswa", "qwen3", window, 2),
        ("mla", "llama", latent, 4),
    ):
        model = tiny_edited(family, edit, num_key_value_heads=kv_heads, **HEADS)
        tiny_edited_checkpoint(model.bfloat16(), folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
