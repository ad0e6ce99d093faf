"""Stand-ins for CANN's libraries: torch_npu and vllm_ascend then import where there is no CANN.

Both are compiled against CANN, which is in no package index. What they take from it is read from
their own symbol tables; one library is made that defines all of it as functions that do nothing
and answer 0, and it goes by the name of every CANN library that is missing. That is enough to
import, to read operator schemas and to run meta kernels. Whatever needs a device fails.

    python cann_stubs.py SITE_PACKAGES FOLDER

Needs binutils and a C compiler. The folder then belongs on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

#: Compiled against CANN: their undefined symbols are what has to be there.
CLIENTS = (
    "torch_npu/lib/*.so",
    "torch_npu/_C*.so",
    "torch_npu/dynamo/torchair/core/*.so",
    "vllm_ascend/*.so",
)
#: Asked for at import, so that nothing would not do. The name is the first 910B's.
ANSWERS = {"aclrtGetSocName": "Ascend910B1", "aclGetRecentErrMsg": ""}
#: C++ type information is data, and read; as long as any of it may be.
DATA_PREFIXES, DATA_BYTES = ("_ZTI", "_ZTV", "_ZTS"), 256


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path, selection: str) -> dict[str, str]:
    """Dynamic symbols without their versions, and the letter of each one's kind."""
    found = {}
    for line in output("nm", "-D", selection, library).splitlines():
        fields = line.split()
        if len(fields) >= 2:
            found[fields[-1].split("@")[0]] = fields[-2]
    return found


def needed(library: Path) -> set[str]:
    """Names of the libraries that one asks for."""
    text = output("readelf", "-d", library)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


def installed_libraries() -> dict[str, Path]:
    """The system's libraries by name."""
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    lines = output(ldconfig, "-p").splitlines()
    pairs = (line.strip().split(" => ") for line in lines if " => " in line)
    return {name.split()[0]: Path(path) for name, path in pairs}


def sources(functions: list[str], data: list[str]) -> str:
    """C that defines the symbols; ``__asm__`` gives C++ names to C objects."""
    lines = [
        f'const char *answer_{name}(void) __asm__("{name}");\n'
        f'const char *answer_{name}(void) {{ return "{text}"; }}'
        for name, text in ANSWERS.items()
    ]
    for i, name in enumerate(functions):
        lines.append(f'long f{i}(void) __asm__("{name}");\nlong f{i}(void) {{ return 0; }}')
    for i, name in enumerate(data):
        lines.append(f'char d{i}[{DATA_BYTES}] __asm__("{name}") = {{0}};')
    return "\n".join(lines) + "\n"


def make(site_packages: Path, folder: Path) -> tuple[int, int]:
    """Build into ``folder``; returns how many symbols and how many library names there are."""
    clients = [path for pattern in CLIENTS for path in sorted(site_packages.glob(pattern))]
    if not clients:
        raise SystemExit(f"error: no torch_npu in {site_packages}: install it first")
    system = installed_libraries()
    beside = {path.name for path in site_packages.glob("torch/lib/*.so*")}
    beside |= {path.name for path in clients}
    names, wanted, defined = set(), {}, set()
    for client in clients:
        for name in needed(client):
            if name in system:
                defined |= set(symbols(system[name], "--defined-only"))
            elif name not in beside and not name.startswith("libpython"):
                names.add(name)
        wanted.update(symbols(client, "--undefined-only"))
        defined |= set(symbols(client, "--defined-only"))
    for library in site_packages.glob("torch/lib/*.so*"):
        defined |= set(symbols(library, "--defined-only"))
    missing = sorted(
        name
        for name, kind in wanted.items()
        if kind == "U" and name not in defined and not re.match(r"_?Py", name)
    )
    data = [name for name in missing if name.startswith(DATA_PREFIXES)]
    functions = [name for name in missing if name not in ANSWERS and name not in data]

    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "stubs.c", folder / "libcannstubs.so"
    source.write_text(sources(functions, data))
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC").split()[0]
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    for name in names:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
    return len(missing), len(names)


def main() -> None:
    """Command line; see the module."""
    count, names = make(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{count} symbols of CANN, in {names} libraries")


if __name__ == "__main__":
    main()
