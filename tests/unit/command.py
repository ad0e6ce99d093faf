"""Runs the ``attnedit`` command inside the test process."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from vllm_attnedit.cli import main


@dataclass(frozen=True)
class Completed:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Attnedit:
    """``attnedit(*arguments)`` as a user would type them."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Completed:
        self.monkeypatch.setattr(sys, "argv", ["attnedit", *map(str, arguments)])
        self.monkeypatch.setenv("COLUMNS", "200")
        self.capsys.readouterr()  # what preparing the test printed
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = self.capsys.readouterr()
        return Completed(code, captured.out, captured.err)

    def refused(self, *arguments: object) -> str:
        """The one line with which bad input is refused."""
        done = self(*arguments)
        assert done.code == 2, done
        assert done.out == ""
        assert len(done.err.strip().splitlines()) == 1, done.err
        return done.err.strip()


@pytest.fixture
def attnedit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attnedit:
    return Attnedit(monkeypatch, capsys)
