"""vLLM's side: its settings, its failures, its end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.verification.answers import REFERENCE
from vllm_attnedit.verification import EngineSettings, ServingError, served

ECHO = """
import json, os, sys
request = json.load(open(sys.argv[1]))
request["environ"] = {k: v for k, v in os.environ.items() if "VLLM" in k or k == "EXTRA"}
json.dump(request, open(os.environ["SEEN"], "w"))
answers = [{"tokens": j["tokens"], "logprobs": [0.0] * 3, "read_logprobs": [float("nan")] * 3,
            "read_greedy": j["tokens"]} for j in request["jobs"]]
json.dump(answers, open(sys.argv[2], "w"))
"""


def test_engine_settings_reach_the_worker(worker: Path, tmp_path: Path) -> None:
    worker.write_text(ECHO)
    seen = tmp_path / "seen.json"
    settings = EngineSettings(
        dtype="bfloat16",
        max_num_batched_tokens=4,
        kv_memory=3 * 2**30 - 1,
        engine_args={"block_size": 32, "enforce_eager": False},
        environ={"SEEN": str(seen), "EXTRA": "1"},
    )
    (answer,) = served.serve_offline("folder", [REFERENCE], settings)
    assert answer.tokens == [10, 11, 12]
    assert math.isnan(answer.read_logprobs[0])
    request = json.loads(seen.read_text())
    assert request["jobs"] == [{"prompt": [1, 2, 3], "tokens": [10, 11, 12]}]
    expected = {"model": "folder", "dtype": "bfloat16", "max_model_len": 7, "block_size": 32}
    expected |= {"enforce_eager": False, "max_num_batched_tokens": 4, "max_num_seqs": 4}
    assert expected.items() <= request["engine"].items()
    assert request["environ"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert request["environ"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert request["environ"]["EXTRA"] == "1"


def test_a_failing_engine_shows_its_last_lines(worker: Path) -> None:
    worker.write_text("for i in range(40): print('line', i)\nraise SystemExit('out of memory')")
    with pytest.raises(ServingError) as caught:
        served.serve_offline("folder", [REFERENCE], EngineSettings())
    lines = str(caught.value).splitlines()
    assert lines[0] == "vLLM failed; its last lines:"
    assert "out of memory" in lines
    assert "line 39" in lines
    assert "line 3" not in lines


def test_a_hanging_engine_is_ended_with_its_children(worker: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    worker.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(ServingError, match="did not end within 2 seconds"):
        served.serve_offline("folder", [REFERENCE], EngineSettings(timeout=2))
    for pid in map(int, pids.read_text().split()):
        assert _ends(pid)


def _ends(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (ProcessLookupError, FileNotFoundError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":  # dead, waiting for init
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_attnedit.verification; print(*{'torch', 'vllm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
