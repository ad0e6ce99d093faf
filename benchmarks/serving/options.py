"""What a serving benchmark is: the schema of its YAML file.

Everything that a comparison must hold equal (``server``, ``workloads``) is stated once for all
systems; a system can only say which model it is, how its window layers are served, and whether the
devices that all of them get hold one copy of it or several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from benchmarks.serving.spread import count_devices
from benchmarks.serving.system import System
from benchmarks.serving.workload import Positive, Workload
from benchmarks.strict_model import StrictModel, validated
from benchmarks.yaml_file import read_yaml


class Server(StrictModel):
    """Settings of ``vllm serve``, the same for all systems.

    Attributes:
        devices: that every system takes, by tensor parallelism where the system asks for nothing
            else. In a file also ``all``, those of the machine.
        v2_runner: ``VLLM_USE_V2_MODEL_RUNNER``, which vLLM else sets by architecture name.
        arguments: further ones.
        environment: further variables.
        start_s: how long a server may take to come up.
        program: what to run instead of this environment's ``vllm``.
        port: a fixed one; by default a free one is taken.
    """

    max_model_len: Positive
    devices: Positive = 1
    max_num_seqs: Positive = 512
    max_num_batched_tokens: Positive = 8192
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    prefix_caching: bool = False
    v2_runner: bool = False
    enforce_eager: bool = False
    dtype: str = "bfloat16"
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    program: tuple[str, ...] = ()
    start_s: Annotated[float, Field(gt=0)] = 900
    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class Measure(StrictModel):
    """How long a level is measured.

    A closed level counts as steady once ``windows`` windows of ``window_s`` seconds in a row had
    output rates within ``within`` of their mean; before that it warms up. It ends ``goal_s`` later,
    but not before a request a user was answered, or after ``limit_s``, when it is reported as not
    steady unless it was. Burst and open loads end with their requests.

    Attributes:
        warm_up_requests: sent at once before each level, and not counted.
        goal_s: seconds of steady state that are measured before a closed level ends.
        client_late_s: lateness of the load generator's event loop (99th percentile) up to which its
            times are believed.
        crosscheck: the level repeated with ``vllm bench serve``, as ``workload:level``.
        client_processes: of the load generator; more are added when one is too busy.
    """

    window_s: Annotated[float, Field(gt=0)] = 5
    windows: Annotated[int, Field(ge=2)] = 3
    within: Annotated[float, Field(gt=0)] = 0.1
    goal_s: Annotated[float, Field(gt=0)] = 20
    limit_s: Annotated[float, Field(gt=0)] = 300
    warm_up_requests: Annotated[int, Field(ge=0)] = 2
    scrape_s: Annotated[float, Field(gt=0)] = 0.5
    client_processes: Positive = 1
    client_late_s: Annotated[float, Field(gt=0)] = 0.05
    crosscheck: str | None = None


class Goal(StrictModel):
    """Latency objectives of goodput."""

    ttft_s: Annotated[float, Field(gt=0)] = 2.0
    tpot_s: Annotated[float, Field(gt=0)] = 0.05


class Options(StrictModel):
    """A whole benchmark.

    Attributes:
        model: ``qwen3-8b``, ``qwen3-30b-a3b`` or ``smollm2-135m`` (true dimensions, dummy weights),
            ``smollm2`` (the real one), or ``{system name: checkpoint folder}``.
        window: of the edit, in tokens.
        repeat_control: whether the control is served once more at the end (A-B-A), or with what.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    model: str | dict[str, Path]
    window: Positive = 128
    systems: Annotated[tuple[System, ...], Field(min_length=1)]
    server: Server
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)]
    measure: Measure = Measure()
    goal: Goal = Goal()
    repeat_control: bool | Annotated[tuple[str, ...], Field(min_length=1)] = True

    @model_validator(mode="after")
    def _fits(self) -> Options:
        for field, names in (
            ("systems", [system.name for system in self.systems]),
            ("workloads", [workload.name for workload in self.workloads]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{field}: give each a name of its own, not {', '.join(names)}")
        devices = self.server.devices
        for system in self.systems:
            if devices % (system.tensor_parallel or devices):
                raise ValueError(
                    f"systems.{system.name}.tensor_parallel: groups of {system.tensor_parallel} do "
                    f"not fill server.devices, {devices}, which all systems have: give a divisor"
                )
        if not isinstance(self.repeat_control, bool):
            control = self.systems[0].name
            served = {w.name for w in self.workloads if control in (w.systems or [control])}
            if unknown := set(self.repeat_control) - served:
                raise ValueError(f"repeat_control: no workload of the control: {sorted(unknown)}")
        known = {system.name for system in self.systems}
        for workload in self.workloads:
            unknown = set(workload.systems or ()) - known
            if unknown:
                raise ValueError(f"workloads: {workload.name} names no system: {sorted(unknown)}")
        if isinstance(self.model, dict) and set(self.model) != known:
            raise ValueError(f"model: give a folder for each of {sorted(known)}")
        levels = [f"{one.name}:{level:g}" for one in self.workloads for level in one.levels]
        if self.measure.crosscheck not in (None, *levels):
            raise ValueError(f"measure.crosscheck: give one of {', '.join(levels)}")
        return self


def load_options(path: Path, devices: int | None = None) -> Options:
    """Read a benchmark's YAML file; relative paths in it are relative to the working folder.

    Args:
        path: of the file.
        devices: instead of its ``server.devices``.

    Raises:
        AttnEditError: naming the file, the field and what is wrong with it.
    """
    data = read_yaml(path)
    server = data.get("server") if isinstance(data, dict) else None
    if isinstance(server, dict):
        if devices is not None:
            server["devices"] = devices
        elif server.get("devices") == "all":
            server["devices"] = count_devices()
    return validated(Options, data, path)
