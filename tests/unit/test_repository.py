"""What holds for the repository as a whole: what its files name, what they avoid, what is built."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Assembled, so that this file passes its own test.
PRIVATE_PATHS = re.compile(
    "|".join(("/" + "work/", "/" + "tmp/w/", "/" + "root/", "/" + r"home/\w+/"))
)
REMOTE_CODE = re.compile("trust" + r"[_-]remote[_-]code\W{0,3}(=\s*|:\s*)?(True|true)")


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def tracked_texts() -> Iterator[tuple[str, str]]:
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            yield str(path.relative_to(ROOT)), content.decode(errors="replace")


def forbidden_in_code(source: str) -> list[str]:
    """Pickle and remote code in Python source, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            constant = isinstance(node.value, ast.Constant) and node.value.value is False
            names = [] if constant else ["trust_remote_code"]
        else:
            continue
        bad = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "torch.load"}
        bad.add("trust_remote_code")
        line = getattr(node, "lineno", 0)
        found += [f"{line}: {name}" for name in names if name in bad]
    return found


def test_no_file_names_a_private_path() -> None:
    found = [
        f"{name}: {match[0]}"
        for name, text in tracked_texts()
        for match in PRIVATE_PATHS.finditer(text)
    ]
    assert not found


def test_requirements_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.*"):
        assert not re.search(r"://|--(extra-)?index-url|--find-links", path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(path)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=flag)",
    ],
)
def test_the_search_for_forbidden_code_finds_it(source: str) -> None:
    assert forbidden_in_code(source)
    assert not forbidden_in_code("load(path, trust_remote_code=False); torch.save(x); import json")


def test_no_pickle_and_no_remote_code_in_python() -> None:
    sources = [(name, text) for name, text in tracked_texts() if name.endswith(".py")]
    assert len(sources) > 10
    found = {name: bad for name, text in sources if (bad := forbidden_in_code(text))}
    assert not found


def test_no_remote_code_in_scripts_and_configurations() -> None:
    suffixes = (".sh", ".yaml", ".yml", ".json", ".toml")
    found = [
        name
        for name, text in tracked_texts()
        if name.endswith(suffixes) and (REMOTE_CODE.search(text) or "--trust-remote" in text)
    ]
    assert not found


def test_shell_scripts_parse() -> None:
    scripts = [str(path) for path in (ROOT / "scripts").glob("*.sh")] + [str(ROOT / ".ci" / "run")]
    assert len(scripts) >= 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_the_lock_satisfies_every_extra_it_was_made_for() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines():
        if re.match(r"[a-zA-Z0-9]", line):
            pin = Requirement(line)
            assert len(pin.specifier) == 1, f"not pinned: {line}"
            if pin.marker is None or pin.marker.evaluate():
                pins[_normalised(pin.name)] = next(iter(pin.specifier)).version
    extras = ("cpu", "training", "bench", "dev")
    wanted = [Requirement(text) for text in requires("vllm-attnedit") or []]
    chosen = [
        requirement
        for requirement in wanted
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
    assert len(chosen) > 15
    for requirement in chosen:
        version = pins.get(_normalised(requirement.name), "missing")
        assert version in requirement.specifier, f"{requirement}: {version}; lock it again"


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    [path] = folder.glob("*.whl")
    assert path.name == "vllm_attnedit-0.1.0-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_declares_plugin_and_command(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    entries = configparser.ConfigParser(delimiters=("=",))
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["vllm.general_plugins"]) == {"attnedit": "vllm_attnedit:register"}
    assert dict(entries["console_scripts"]) == {"attnedit": "vllm_attnedit.cli:main"}


def test_the_wheel_holds_the_plugin_its_licence_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {
        "vllm_attnedit",
        "vllm_attnedit-0.1.0.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "vllm_attnedit/py.typed" in names
    tracked = {str(path.relative_to(ROOT)) for path in tracked_files()}
    modules = {name for name in tracked if name.startswith("vllm_attnedit/")}
    assert modules <= set(names)
