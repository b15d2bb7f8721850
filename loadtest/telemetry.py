"""Utilisation of the machine, of the server's processes and of the GPU, and the server's own metrics, all on
the records' clock.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from flightline.loadtest.metrics import Window

INTERVAL_S = 0.5
ENGINE_MODEL = "tensorrt_llm"
"""The wire contract's name, whatever the backend."""


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
    series: dict[str, float] = field(default_factory=dict)
    """Everything else by the names of :data:`SERIES`; what could not be read is missing."""
    model_memory_mib: dict[str, float] = field(default_factory=dict)
    """Triton model -> GPU memory that it says it holds."""


@dataclass(frozen=True)
class Series:
    """How a report shows one of a sample's values."""

    title: str
    unit: str
    scale: float = 1.0


SERIES = {
    "active": Series("Requests in the engine", ""),
    "waiting": Series("Requests waiting in the engine", ""),
    "batch": Series("Requests in a step", ""),
    "pending": Series("Requests waiting in Triton", ""),
    "kv_used": Series("KV cache in use", "%", 100),
    "kv_reused": Series("KV blocks reused", ""),
    "memory_mib": Series("Memory of the machine in use", "MiB"),
    "server_memory_mib": Series("Memory of the server", "MiB"),
    "gpu_energy_j": Series("GPU energy so far", "J"),
    "gpu_clock_mhz": Series("GPU clock (SM)", "MHz"),
    "gpu_throttled": Series("GPU slowed down by heat or power", "%", 100),
    "sm_active": Series("SMs active", "%", 100),
    "tensor_active": Series("Tensor cores active", "%", 100),
    "dram_active": Series("GPU memory active", "%", 100),
}


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
    gpu_energy_j: float | None = None
    """Used in the windows, by the GPUs' own counters."""
    seconds: float = 0.0
    """Of the windows, as far as they were sampled."""
    series: dict[str, float] = field(default_factory=dict)
    model_memory_mib: dict[str, float] = field(default_factory=dict)
    """Most GPU memory of each Triton model, by its own account (the driver's context comes on top)."""

    def memory_mib_of(self, endpoint: str) -> float | None:
        """GPU memory of the model behind an endpoint: its own, or else the engine's, to which it is an endpoint."""
        return self.model_memory_mib.get(endpoint, self.model_memory_mib.get(ENGINE_MODEL))


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
        """Fields of :class:`Sample`, as far as the GPUs tell them; empty without a GPU."""
        values: dict[str, float] = {}
        if not self._handles:
            return values
        nvml, handles = self._nvml, self._handles
        with suppress(nvml.NVMLError):  # a GPU with MIG on tells no utilisation
            percents = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
            values["gpu_percent"] = sum(percents) / len(percents)
        with suppress(nvml.NVMLError):
            values["gpu_memory_mib"] = sum(nvml.nvmlDeviceGetMemoryInfo(h).used for h in handles) / 2**20
        with suppress(nvml.NVMLError):
            values["gpu_power_w"] = sum(map(nvml.nvmlDeviceGetPowerUsage, handles)) / 1e3
        return values

    def read_series(self) -> dict[str, float]:
        """Values of :data:`SERIES` that the GPUs offer: not all offer all."""
        values: dict[str, float] = {}
        if not self._handles:
            return values
        nvml, handles = self._nvml, self._handles
        slow = nvml.nvmlClocksThrottleReasonHwSlowdown | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        slow |= (
            nvml.nvmlClocksThrottleReasonHwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        with suppress(nvml.NVMLError):
            values["gpu_clock_mhz"] = sum(
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) for handle in handles
            ) / len(handles)
        with suppress(nvml.NVMLError):
            values["gpu_energy_j"] = sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1e3
        with suppress(nvml.NVMLError):
            reasons = [nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) for handle in handles]
            values["gpu_throttled"] = sum(bool(reason & slow) for reason in reasons) / len(handles)
        return values


class Sampler:
    """A thread that samples until it is stopped.

    Args:
        server_pids: Roots of the server's process trees now; none if it was started elsewhere.
        triton_url: Triton's metrics page; empty: none.
        dcgm_url: Metrics page of a DCGM exporter; empty: none.
    """

    def __init__(
        self, server_pids: Callable[[], list[int]], triton_url: str = "", dcgm_url: str = ""
    ) -> None:
        self.gpus = Gpus()
        self.samples: list[Sample] = []
        self.missing: dict[str, str] = {}
        """Metrics page -> why it could not be read, the first time."""
        self._pids = server_pids
        self._triton_url = triton_url
        self._pages = {url: pick for url, pick in ((triton_url, _of_triton), (dcgm_url, _of_dcgm)) if url}
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
        joules = [
            last.series["gpu_energy_j"] - first.series["gpu_energy_j"]
            for first, last in spans
            if "gpu_energy_j" in first.series and "gpu_energy_j" in last.series
        ]
        means = {name: [s.series[name] for s in inside if name in s.series] for name in SERIES}
        return Utilisation(
            cpu_percent=100 * busy / seconds / psutil.cpu_count(),
            server_cores=sum(cores.values()) if cores else None,
            cores_by_process={name: used for name, used in sorted(cores.items(), key=lambda item: -item[1])},
            **{name: _mean(inside, name) for name in ("gpu_percent", "gpu_memory_mib", "gpu_power_w")},
            gpu_energy_j=sum(joules) if joules else None,
            seconds=seconds,
            series={name: sum(values) / len(values) for name, values in means.items() if values},
            model_memory_mib={
                model: max(s.model_memory_mib.get(model, 0.0) for s in inside)
                for model in dict.fromkeys(model for s in inside for model in s.model_memory_mib)
            },
        )

    def _span(self, window: Window) -> tuple[Sample, Sample] | None:
        inside = [sample for sample in self.samples if window.start_ns <= sample.time_ns <= window.end_ns]
        return (inside[0], inside[-1]) if len(inside) > 1 else None

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            times = psutil.cpu_times()
            busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
            pids = self._pids()
            series = {"memory_mib": psutil.virtual_memory().used / 2**20, **self.gpus.read_series()}
            if pids:
                series["server_memory_mib"] = process_memory_mib(pids)
            memory: dict[str, float] = {}
            for url, pick in self._pages.items():
                try:
                    page = fetch_metrics(url)
                    series |= pick(page)
                    if url == self._triton_url:
                        memory = model_memory_mib(page)
                except (OSError, ValueError) as error:
                    self.missing.setdefault(url, str(error))
            self.samples.append(
                Sample(
                    time.monotonic_ns(),
                    busy,
                    process_seconds(pids),
                    **self.gpus.read(),
                    series=series,
                    model_memory_mib=memory,
                )
            )


Metrics = dict[tuple[str, str], float]
"""(family, the value of a label, or model/value) -> sum over the models and GPUs that have it."""


def fetch_metrics(url: str, timeout_s: float = 1.0) -> Metrics:
    """A Prometheus page's samples, keyed as :data:`Metrics`.

    Raises:
        OSError: nobody answers.
        ValueError: it is not such a page.
    """
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return parse_metrics(response.read().decode())


def parse_metrics(text: str) -> Metrics:
    """Prometheus' text format; values of the same name and label value are added up.

    Names stay what the page calls them: prometheus_client's parser gives every counter the ending ``_total``.
    """
    values: Metrics = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)(\s+\d+)?", line.strip())
        if match is None:
            raise ValueError(f"not a metrics page: {line[:60]!r}")
        name, labels, number = match[1], match[2] or "", float(match[3])
        found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
        of_model = {f"{found['model']}/{value}" for value in found.values()} if "model" in found else set()
        for label in {"", *found.values(), *of_model}:
            values[name, label] = values.get((name, label), 0.0) + number
    return values


def _of_triton(page: Metrics) -> dict[str, float]:
    """Triton's and the engine's values under the names of :data:`SERIES`."""
    wanted = {
        "active": ("nv_trt_llm_request_metrics", "active"),
        "waiting": ("nv_trt_llm_request_metrics", "waiting"),
        "batch": ("nv_trt_llm_request_metrics", "scheduled"),
        "kv_used": ("nv_trt_llm_kv_cache_block_metrics", "fraction"),
        "kv_reused": ("nv_trt_llm_kv_cache_block_metrics", "reused"),
        "pending": ("nv_inference_pending_request_count", ""),
    }
    return {name: page[key] for name, key in wanted.items() if key in page}


def model_memory_mib(page: Metrics) -> dict[str, float]:
    """Triton model -> GPU memory that it says it holds; those on a CPU hold none and are left out."""
    return {
        label.removesuffix("/gpu"): value / 2**20
        for (family, label), value in page.items()
        if family == "nv_trt_llm_runtime_memory_metrics" and label.endswith("/gpu") and value
    }


def _of_dcgm(page: Metrics) -> dict[str, float]:
    """DCGM's profiling values (shares from 0 to 1), as means over the GPUs."""
    gpus = max(
        1,
        len({label for name, label in page if name == "DCGM_FI_PROF_SM_ACTIVE" and label.startswith("GPU-")}),
    )
    wanted = {
        "sm_active": "DCGM_FI_PROF_SM_ACTIVE",
        "tensor_active": "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        "dram_active": "DCGM_FI_PROF_DRAM_ACTIVE",
    }
    return {name: page[family, ""] / gpus for name, family in wanted.items() if (family, "") in page}


def _below(roots: list[int]) -> Iterator[psutil.Process]:
    """The processes that are there of ``roots`` and their children."""
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            yield from [psutil.Process(root), *psutil.Process(root).children(recursive=True)]


def process_memory_mib(roots: list[int]) -> float:
    """Memory of the processes below ``roots`` (resident, shared pages counted for each)."""
    total = 0
    for process in _below(roots):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 2**20


def process_seconds(roots: list[int]) -> dict[str, float]:
    """CPU seconds of the processes below ``roots``, by name; same names add up."""
    seconds: dict[str, float] = {}
    for process in _below(roots):
        with suppress(psutil.Error):
            name, times = process_name(process.cmdline()), process.cpu_times()
            seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def process_name(command: list[str]) -> str:
    """A short name: Triton's stubs by their model, Python programs by their module."""
    line = " ".join(command)
    if "triton_python_backend_stub" in line:
        model = re.search(r"/([^/\s]+)/\d+/model\.py", line)
        return f"stub {model.group(1)}" if model else "stub"
    if module := re.search(r" -m ([\w.]+)", line):
        return module.group(1).removeprefix("flightline.")
    return command[0].rsplit("/", 1)[-1] if command else "?"


def _mean(samples: list[Sample], name: str) -> float | None:
    values = [value for sample in samples if (value := getattr(sample, name)) is not None]
    return sum(values) / len(values) if values else None
