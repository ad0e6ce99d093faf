"""Fetch a teacher, give it the trained attention kept here, serve it, ask it something."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

from examples.quickstart.processes import CommandFailed, run, stop_on_signals
from examples.quickstart.server import serve
from examples.quickstart.teacher import CACHE, fetch_teacher

MODEL_NAME = "smollm2-gateswa"
EDIT = Path(__file__).with_name("smollm2_gateswa.safetensors")
QUESTION = "What is the capital of France?"
REQUEST_TOKENS = 8192  # SmolLM2's whole context

_started = time.monotonic()


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder for models and logs (default: .cache)"
    )
    options = parser.parse_args()
    cache: Path = options.cache.resolve()
    stop_on_signals()
    try:
        _say("teacher: SmolLM2-135M-Instruct (93 MB, fetched unless it is there)")
        teacher = fetch_teacher(cache)
        # Named by the edit: a newer one does not find the older one's.
        digest = hashlib.sha256(EDIT.read_bytes()).hexdigest()[:8]
        edited = _edit(teacher, cache / "edited" / f"SmolLM2-135M-Instruct-gateswa-{digest}")
        _ask(edited, options.question, cache / "serve.log")
        _report(edited)
    except (CommandFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _started:3.0f} s] {text}", flush=True)


def _shown(path: Path) -> str:
    """``path`` as a user in the current folder would type it."""
    return os.path.relpath(path)


def _edit(teacher: Path, edited: Path) -> Path:
    # The command renames a finished folder into place: what is there is whole.
    if (edited / "config.json").is_file():
        _say(f"edited checkpoint: {_shown(edited)} is there")
        return edited
    attnedit = str(Path(sys.executable).with_name("attnedit"))
    command = [attnedit, "edit", str(teacher), str(edited), "--from-edit", str(EDIT)]
    _say(f"attnedit {' '.join([_shown(Path(p)) if os.sep in p else p for p in command[1:]])}")
    edited.parent.mkdir(parents=True, exist_ok=True)
    run(command)
    return edited


def _ask(edited: Path, question: str, log: Path) -> None:
    # Takes a second to import; a fetch or an edit that fails should not wait for it.
    from openai import OpenAI

    os.environ["NO_PROXY"] = "127.0.0.1"
    _say(f"vllm serve {_shown(edited)} (log: {_shown(log)})")
    with serve(edited, MODEL_NAME, log=log, on_wait=_Waiting()) as base_url:
        _say(f"ready at {base_url}; asking over /v1/chat/completions")
        client = OpenAI(base_url=base_url, api_key="none", timeout=120.0)
        answer = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=128,
        )
        print(f"\n  you    {question}\n  model  {answer.choices[0].message.content}\n")
        _say("stopping the server")


class _Waiting:
    """A live line on a terminal; in a log a line every ten seconds."""

    def __init__(self) -> None:
        self._next = 10.0

    def __call__(self, seconds: float) -> None:
        if sys.stdout.isatty():
            print(f"\r        starting, {seconds:.0f} s (usually 30 to 60) ", end="\r", flush=True)
        elif seconds >= self._next:
            self._next += 10.0
            _say("  ... starting")


def _report(edited: Path) -> None:
    from vllm_attnedit.accounting import kv_bytes_per_request, kv_bytes_per_token
    from vllm_attnedit.checkpoint import load_config

    config = load_config(edited)
    teacher = config.teacher_config()
    rows = [
        (
            "KV bytes per token, long context",
            kv_bytes_per_token(teacher),
            kv_bytes_per_token(config),
        ),
        (
            f"KV bytes of a request of {REQUEST_TOKENS} tokens",
            kv_bytes_per_request(teacher, REQUEST_TOKENS),
            kv_bytes_per_request(config, REQUEST_TOKENS),
        ),
    ]
    print(f"\n{'':38}{'teacher':>14}{'edited':>14}")
    for label, before, after in rows:
        print(f"{label:38}{before:14,}{after:14,}  ({1 - after / before:.0%} less)")
    print(
        f"\nedited checkpoint: {edited}\n"
        "next: .venv/bin/attnedit kv " + _shown(edited) + "\n"
        "      .venv/bin/attnedit inspect " + _shown(edited) + "\n"
        "      .venv/bin/vllm serve " + _shown(edited) + " --max-model-len 2048 --enforce-eager"
    )


if __name__ == "__main__":
    sys.exit(main())
