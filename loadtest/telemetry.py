"""Utilisation of the machine, of the server's processes, and of the GPU, on the records' clock."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from loadtest.metrics import Window

INTERVAL_S = 0.5


@dataclass(frozen=True)
class Sample:
    """Cumulative CPU seconds, and the GPU's state, at one moment."""

    time_ns: int
    busy_s: float
    """Of all cores of the machine."""
    process_s: dict[str, float]
    """Process name -> user plus system time since its start."""
    gpu_percent: float | None = None
    gpu_memory_mib: float | None = None
    gpu_power_w: float | None = None


@dataclass(frozen=True)
class Utilisation:
    """Means over some windows; None where it could not be measured."""

    cpu_percent: float | None
    """Of the whole machine, the load generator included."""
    server_cores: float | None
    """Cores that the server's processes kept busy."""
    cores_by_process: dict[str, float] = field(default_factory=dict)
    gpu_percent: float | None = None
    gpu_memory_mib: float | None = None
    gpu_power_w: float | None = None


class Gpus:
    """NVML, if there is a driver: means over the visible GPUs, memory and power as sums."""

    def __init__(self) -> None:
        self._handles: list = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self.missing = "" if self._handles else "no GPU"
        except ImportError:
            self.missing = "pynvml is not installed"
        except pynvml.NVMLError as error:
            self.missing = f"no GPU ({error})"

    @property
    def names(self) -> list[str]:
        return [str(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    def read(self) -> dict[str, float]:
        if not self._handles:
            return {}
        nvml = self._nvml
        percents = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self._handles]
        return {
            "gpu_percent": sum(percents) / len(percents),
            "gpu_memory_mib": sum(nvml.nvmlDeviceGetMemoryInfo(h).used for h in self._handles) / 2**20,
            "gpu_power_w": sum(nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1e3,
        }


class Sampler:
    """A thread that samples until it is stopped.

    Args:
        server_pids: Roots of the server's process trees now; none if it was started elsewhere.
    """

    def __init__(self, server_pids: Callable[[], list[int]]) -> None:
        self.gpus = Gpus()
        self.samples: list[Sample] = []
        self._pids = server_pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def over(self, windows: list[Window]) -> Utilisation:
        """Means over the windows, weighted by time."""
        spans = [span for window in windows if (span := self._span(window))]
        seconds = sum((last.time_ns - first.time_ns) / 1e9 for first, last in spans)
        if not seconds:
            return Utilisation(None, None)
        busy = sum(last.busy_s - first.busy_s for first, last in spans)
        cores: dict[str, float] = {}
        for first, last in spans:
            for name, used in last.process_s.items():
                cores[name] = cores.get(name, 0.0) + (used - first.process_s.get(name, 0.0)) / seconds
        inside = [s for s in self.samples for w in windows if w.start_ns <= s.time_ns <= w.end_ns]
        return Utilisation(
            cpu_percent=100 * busy / seconds / psutil.cpu_count(),
            server_cores=sum(cores.values()) if cores else None,
            cores_by_process={name: used for name, used in sorted(cores.items(), key=lambda item: -item[1])},
            **{name: _mean(inside, name) for name in ("gpu_percent", "gpu_memory_mib", "gpu_power_w")},
        )

    def _span(self, window: Window) -> tuple[Sample, Sample] | None:
        inside = [sample for sample in self.samples if window.start_ns <= sample.time_ns <= window.end_ns]
        return (inside[0], inside[-1]) if len(inside) > 1 else None

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            times = psutil.cpu_times()
            busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
            self.samples.append(
                Sample(time.monotonic_ns(), busy, process_seconds(self._pids()), **self.gpus.read())
            )


def process_seconds(roots: list[int]) -> dict[str, float]:
    """CPU seconds of the processes below ``roots``, by name; same names add up."""
    seconds: dict[str, float] = {}
    for root in roots:
        try:
            processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in processes:
            try:
                name, times = process_name(process.cmdline()), process.cpu_times()
            except psutil.Error:
                continue
            seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def process_name(command: list[str]) -> str:
    """A short name: Triton's stubs by their model, Python programs by their module."""
    line = " ".join(command)
    if "triton_python_backend_stub" in line:
        model = re.search(r"/([^/\s]+)/\d+/model\.py", line)
        return f"stub {model.group(1)}" if model else "stub"
    if module := re.search(r" -m ([\w.]+)", line):
        return module.group(1)
    return command[0].rsplit("/", 1)[-1] if command else "?"


def _mean(samples: list[Sample], name: str) -> float | None:
    values = [value for sample in samples if (value := getattr(sample, name)) is not None]
    return sum(values) / len(values) if values else None
