"""Images and compose file, as far as they can be held to something without a Docker engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_run_as_nobody_special_and_tell_their_health(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["10001"]
    sources = [
        source
        for line in lines
        if line.startswith("COPY")
        for source in line.split()[1:-1]
        if not source.startswith("--")
    ]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    assert "." not in sources  # a checkout may hold checkpoints


def test_the_load_generator_needs_no_more_than_its_image_has() -> None:
    """It is imported where every package is hidden that its requirements do not bring."""
    image = _with_what_they_need((DOCKER / "locust/requirements.txt").read_text().split())
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not image & {canonicalize_name(owner) for owner in owners}
    } - {"benchmarks", "vllm_attnedit"}
    assert {"torch", "transformers", "vllm"} <= hidden
    code = (
        "import sys; hidden = set(sys.argv[1:])\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in hidden: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import benchmarks.serving.locustfile"
    )
    command = [sys.executable, "-c", code, *sorted(hidden)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _with_what_they_need(names: list[str]) -> set[str]:
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = ["", *requirement.extras]
        if name in found or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            for extra in extras
        ):
            continue
        found.add(name)
        todo += [Requirement(line) for line in requires(name) or ()]
    return found


def test_nothing_is_fetched_by_what_runs() -> None:
    for path in DOCKERFILES:
        if path.parent.name != "locust":
            assert "HF_HUB_OFFLINE=1" in path.read_text()
    grafana = COMPOSE["services"]["grafana"]["environment"]
    assert grafana["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    assert grafana["GF_ANALYTICS_CHECK_FOR_UPDATES"] == "false"


def test_the_cuda_image_is_the_host_that_is_supported() -> None:
    from vllm_attnedit.compat import SUPPORTED_VLLM

    (base,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", DOCKERFILES[1].read_text(), re.M)
    assert base in SUPPORTED_VLLM


def test_compose_file_follows_the_specification() -> None:
    """Anchors and variables are resolved first, as compose does."""
    resolved = {key: value for key, value in COMPOSE.items() if not key.startswith("x-")}
    text = re.sub(r"\$\{MODEL:[^}]*\}", "/model", yaml.safe_dump(resolved, width=1000))
    compose = PyCompose.from_yaml(text)
    compose.validate()
    assert set(compose.service_names()) == set(COMPOSE["services"])
    wrong = yaml.safe_dump({"services": {"server": {"image": "x", "port": ["80:80"]}}})
    with pytest.raises(ValueError, match="port"):
        PyCompose.from_yaml(wrong).validate()


def test_one_command_brings_up_everything() -> None:
    services = COMPOSE["services"]
    for profile in ("cuda", "cpu"):
        up = {name for name, service in services.items() if profile in service["profiles"]}
        assert up == {f"server-{profile}", "prometheus", "grafana", "locust"}
    published: list[str] = []
    for name, service in services.items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")  # nothing here asks for a password
        if not name.endswith("cpu"):
            published += service["ports"]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert volume.endswith(":ro")
            assert source.startswith("${MODEL") or (DOCKER / source).exists()
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert len(set(published)) == len(published)


def test_prometheus_and_grafana_point_at_each_other() -> None:
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "server:8000"
    provisioning = DOCKER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    for panel in _dashboard()["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Names in the host's own source, without the endings that Prometheus adds."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    metrics = Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py"
    known = metrics.read_text()
    known += (ROOT / "vllm_attnedit/kv_server.py").read_text()
    asked = {
        name
        for panel in _dashboard()["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|attnedit):\w+", target["expr"])
    }
    assert len(asked) >= 12
    for name in asked:
        assert f'"{re.sub("_(total|bucket)$", "", name)}"' in known, name


def _dashboard() -> dict[str, Any]:
    text = (DOCKER / "grafana/dashboards/vllm-attnedit.json").read_text()
    dashboard: dict[str, Any] = json.loads(text)
    return dashboard
