"""Output is whole or absent, and what killed runs leave is cleared away."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from vllm_attnedit.edit.output import output_file, output_folder
from vllm_attnedit.errors import AttnEditError


def test_the_folder_appears_at_the_end_with_its_parents(tmp_path):
    out = tmp_path / "a" / "b"
    with output_folder(out, 10) as folder:
        assert folder.parent == out.parent
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [p.name for p in out.parent.iterdir()] == ["b"]


def test_an_empty_folder_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with output_folder(out, 10) as folder:
        (folder / "file").write_text("x")
    assert [p.name for p in out.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_on_failure(tmp_path, error):
    kept = tmp_path / "kept"
    kept.mkdir()

    def fail() -> None:
        with output_folder(tmp_path / "new" / "out", 10) as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == [kept]


def test_parents_that_others_have_filled_are_kept(tmp_path):
    def fail() -> None:
        with output_folder(tmp_path / "new" / "out", 10):
            (tmp_path / "new" / "other").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["other"]


def test_partial_folders_of_dead_processes_go_and_of_living_ones_stay(tmp_path):
    ask = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = tmp_path / f".out.partial-{subprocess.check_output(ask, text=True).strip()}"
    alive = tmp_path / f".out.partial-{os.getppid()}"
    other = tmp_path / ".out.partial-x"
    for folder in (dead, alive, other):
        folder.mkdir()
    with output_folder(tmp_path / "out", 10):
        assert not dead.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, other.name, "out"])


def test_disk_errors_become_one_line(tmp_path):
    def fail(number: int) -> None:
        with output_folder(tmp_path / "out", 10):
            raise OSError(number, os.strerror(number))

    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(AttnEditError, match=r"free space or choose another disk"):
            fail(number)
    with pytest.raises(AttnEditError, match="Read-only file system"):
        fail(errno.EROFS)


def test_a_single_file_is_whole_or_absent_too(tmp_path):
    with output_file(tmp_path / "a", 10) as partial:
        partial.write_text("x")
    assert (tmp_path / "a").read_text() == "x"
    with pytest.raises(AttnEditError, match="name a new file"), output_file(tmp_path / "a", 10):
        pass

    def fail() -> None:
        with output_file(tmp_path / "b", 10) as partial:
            partial.write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with output_folder(tmp_path / "out", 10) as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["file"]


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    """It cannot be renamed over."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "out")
    refused = pytest.raises(AttnEditError, match=r"name a folder inside it")
    with refused, output_folder(tmp_path / "out", 10):
        pass


def test_what_a_process_of_this_number_left_is_removed(tmp_path):
    """In containers a killed run and the next one have the same number."""
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "file").write_text("old")
    with output_folder(tmp_path / "out", 10) as folder:
        assert not list(folder.iterdir())
    (tmp_path / ".a.edit.partial-999999999").write_text("old")
    with output_file(tmp_path / "a.edit", 10) as file:
        file.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.edit", "out"]
