"""Draws ``kv_memory.png``: KV memory of a request against its length, for Qwen3-8B and its edits.

    python docs/figures/kv_memory.py

Writes the figure and, beside it, ``kv_memory.json`` with the numbers drawn. Both follow from
``vllm_attnedit.accounting`` alone; nothing is measured.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from vllm_attnedit.accounting import kv_bytes_per_request
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.patterns import EditPlan, build_edit

FOLDER = Path(__file__).parent
DATA = FOLDER / "kv_memory.json"
FIGURE = FOLDER / "kv_memory.png"

LENGTHS = [1024 * 2**power for power in range(8)]  # 1K to 128K
DIMENSIONS: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
}
# Okabe and Ito's palette, told apart in every form of colour blindness; the dashes help in print.
# The last number lifts a label, in points, so that neighbours do not touch.
STYLES = {
    "full attention": ("#000000", "-", "o", 0),
    "MLA": ("#0072B2", "--", "s", 6),
    "GateSWA, window 128": ("#D55E00", "-.", "^", -10),
}


def models() -> dict[str, Any]:
    """Configurations of the three lines, by their label."""
    teacher = CONFIG_MAPPING["qwen3"](**DIMENSIONS)

    def edited(target: str) -> AttnEditConfig:
        edit = build_edit(EditPlan(target=target), teacher)
        return AttnEditConfig("qwen3", edit, **DIMENSIONS)

    lines = (teacher, edited("mla"), edited("gateswa"))
    return dict(zip(STYLES, lines, strict=True))


def compute() -> dict[str, Any]:
    """Bytes (16-bit elements, exact tokens, one GPU) by label and length."""
    lines = {
        label: [kv_bytes_per_request(config, length) for length in LENGTHS]
        for label, config in models().items()
    }
    return {"lengths": LENGTHS, "bytes": lines}


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw ``data``; the file names the numbers it shows by their hash."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = data["lengths"]
    figure, axes = pyplot.subplots(figsize=(7.6, 4.4), dpi=160, layout="constrained")
    full = data["bytes"]["full attention"][-1]
    for label, values in data["bytes"].items():
        colour, dashes, marker, lift = STYLES[label]
        mib = [value / 2**20 for value in values]
        axes.plot(lengths, mib, dashes, marker=marker, color=colour, linewidth=2, markersize=5)
        saved = "" if values[-1] == full else f" (−{100 * (1 - values[-1] / full):.0f}%)"
        axes.annotate(
            f"{label}\n{values[-1] / 2**30:.1f} GiB{saved}",
            (lengths[-1], mib[-1]),
            xytext=(9, lift),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    ticks = [2**power for power in range(5, 16, 2)]
    axes.set_yticks(ticks, [f"{t} MiB" if t < 1024 else f"{t // 1024} GiB" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of the request (prompt and answer)")
    axes.set_title("KV cache of one request, Qwen3-8B, 16-bit", loc="left")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Software": None, "Description": digest(data)}
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)


def digest(data: dict[str, Any]) -> str:
    """Identifies the numbers of a figure."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Write both files."""
    data = compute()
    DATA.write_text(json.dumps(data, indent=2) + "\n")
    draw(data, FIGURE)
    print(f"{FIGURE.name} and {DATA.name} written to {FIGURE.parent}")


if __name__ == "__main__":
    main()
