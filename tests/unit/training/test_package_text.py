"""Text out of package archives."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.training.text import conversations, joined, pages, plain
from training.config import SourceConfig
from training.data.sources import read_source

PAGE = """<html><head><title>no</title><style>p { no: no }</style></head><body><nav>no</nav>
<div role="main"><h1>Title¶</h1><p>One <em>line</em>.</p><ul><li>a</li><li>b</li></ul>
<script>no()</script></div><footer>no</footer></body></html>"""


def test_prose_of_a_page() -> None:
    assert plain(PAGE) == "Title\n\nOne line.\n\na\n\nb"
    assert plain("<p>no frame, <b>but</b> text</p>") == "no frame, but text"
    assert plain("") == ""


def test_conversations_of_an_array_that_is_cut_off(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "{[hello]}"}]
    text = json.dumps([{"id": str(i), "conversations": said} for i in range(3)])
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/data/all.json", text[: -len(text) // 6])
    found = list(conversations(wheel))
    assert found == [{"conversations": said}] * 2
    lines = tmp_path / "chat.jsonl"
    lines.write_text("\n".join(map(json.dumps, found)))
    ((_, one), _) = read_source(SourceConfig(kind="chat", path=str(lines)), "data.sources.0")
    assert [message["content"] for message in one if isinstance(message, dict)] == [
        "hi",
        "{[hello]}",
    ]


def test_pages_of_a_package(tmp_path: Path) -> None:
    doc = tmp_path / "made/usr/share/doc/some"
    for name in ("html", "_sources", "html/fr-FR", "html/en-US"):
        (doc / name).mkdir(parents=True, exist_ok=True)
    control = tmp_path / "made/DEBIAN/control"
    control.parent.mkdir()
    control.write_text(
        "Package: some\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    long = "words and words " * 40
    for name in ("html/page.html", "html/fr-FR/no.html", "html/en-US/yes.html", "_sources/no.txt"):
        (doc / name).write_text(f"<body><p>{name} {long}</p></body>")
    (doc / "short.txt").write_text("short")
    (doc / "copyright.txt").write_text(long)
    (doc / "image.png").write_bytes(b"\0")
    (doc / "notes.txt.gz").write_bytes(gzip.compress(f"notes {long}".encode()))
    entries = "\n\n".join(f"word{i}\n  " + "meaning " * 30 for i in range(40))
    (doc / "some.dict.dz").write_bytes(gzip.compress(entries.encode()))
    subprocess.run(
        ["dpkg-deb", "-b", tmp_path / "made", tmp_path / "some.deb"],
        check=True, capture_output=True,
    )  # fmt: skip
    texts = [str(record["text"]) for record in pages(tmp_path / "some.deb")]
    dictionary = [text for text in texts if "meaning" in text]
    assert sorted(text.split()[0] for text in texts if "meaning" not in text) == [
        "html/en-US/yes.html", "html/page.html", "notes",
    ]  # fmt: skip
    assert len(dictionary) >= 3
    whole = "".join(dictionary)
    assert all(f"word{i}\n" in whole for i in range(30))


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0, ["aaa", "bb", "c"]),
        (4, ["aaa\n\nbb", "c"]),
        (5, ["aaa\n\nbb", "c"]),
        (99, ["aaa\n\nbb\n\nc"]),
    ],
)
def test_pages_are_joined_in_order(least: int, expected: list[str]) -> None:
    records: list[dict[str, object]] = [{"text": text} for text in ("aaa", "bb", "c")]
    assert [record["text"] for record in joined(records, least)] == expected
    assert not list(joined([], least))


def test_a_length_that_is_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.text", tmp_path / "out", "long"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "text: CHARACTERS: long: give a number, such as 40000\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "1", "b"]])
def test_without_a_folder_it_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.text", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "benchmarks.training.text FOLDER" in done.stdout
