"""Where the real ``tritonserver`` is, and how it must be started.

Two homes: the NGC container's own, and the one inside the wheel ``nvidia-pytriton`` (Triton 2.51, Python
backend only). The wheel's needs care: its Python stub takes the interpreter from ``PATH`` and ``libpython``
from ``LD_LIBRARY_PATH`` (PYTHONPATH, PYTHONHOME and VIRTUAL_ENV are ignored), must lie beside the backend,
and crashes with numpy 2.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flightline.model_repository.shared.gate import VARIABLE as GATE_VARIABLE
from flightline.supervisor.errors import ServeError
from flightline.supervisor.settings import ServeSettings
from flightline.torch_engine.process.routing import SOCKETS_VARIABLE

CONTAINER_HOME = Path("/opt/tritonserver")
PROJECT = Path(__file__).parents[2]
"""Where ``import flightline`` finds it."""
STUB = "triton_python_backend_stub"
CLOSED = "model-repository,shared-memory,trace,logging:closed\n=-"
"""Endpoints that run code, map memory or write files, closed to everybody.

Triton can only ask for a header, and learns its value on the command line, where every local user reads it. So it is
one that nobody can send: neither HTTP nor gRPC has headers with a line end in their name.
"""
EXIT_S = 5
"""Seconds that it gets to end when no request is running; an open gRPC stream, idle or not, keeps it for ever."""
STUB_MEMORY_BYTES = 16 << 20
"""Shared memory of each Python stub at its start."""
MODELS_AT_ONCE = 16
"""Loaded; Triton's own four would let the fifth wait until a stub of them has started."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_ARENA_MAX": "4"}
"""Of glibc, in Triton's own process: memory of long prompts goes back to the system when they are done. Left alone,
glibc learns from the first of them to keep pieces of up to 32 MiB, in an arena for each of many threads.
"""
OWN_MEMORY = Path(__file__).with_name("own_memory.py")


@dataclass(frozen=True)
class Triton:
    """One installation of the server."""

    home: Path
    in_container: bool

    @property
    def binary(self) -> Path:
        return self.home / "bin" / "tritonserver"


def find() -> Triton:
    """Raises ServeError: no Triton here."""
    if (CONTAINER_HOME / "bin" / "tritonserver").is_file():
        return Triton(CONTAINER_HOME, in_container=True)
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServeError(
            "no Triton server found: install nvidia-pytriton (make setup), or use the NGC container"
        )
    triton = Triton(Path(package.origin).parent / "tritonserver", in_container=False)
    if not triton.binary.is_file():
        raise ServeError(f"{triton.binary} does not exist: reinstall nvidia-pytriton")
    return triton


def check_python(triton: Triton) -> None:
    """Raises ServeError: Triton's stub cannot run this Python."""
    if triton.in_container:
        return
    if int(np.__version__.split(".")[0]) >= 2:
        raise ServeError(f"numpy {np.__version__} crashes this Triton's Python stub: install numpy<2")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = triton.home / "python_backend_stubs"
    if not (stubs / version / STUB).is_file():
        known = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise ServeError(f"this Triton has no stub for Python {version}: use one of {known}")
    library = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or "")
    if not library.is_file() or ".so" not in library.name:
        raise ServeError(
            f"Python {version} at {sys.base_prefix} has no shared libpython ({library}): "
            "use a Python that was built with --enable-shared"
        )


def prepare_backends(triton: Triton, run_dir: Path) -> Path:
    """A private backend folder with this Python's stub in it; site-packages stays untouched."""
    if triton.in_container:
        return triton.home / "backends"
    backends = run_dir / "backends"
    shutil.rmtree(backends, ignore_errors=True)
    python = backends / "python"
    python.mkdir(parents=True)
    for source in (triton.home / "backends" / "python").iterdir():
        if source.is_file() and source.name != STUB:
            shutil.copy2(source, python / source.name)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(triton.home / "python_backend_stubs" / version / STUB, python / STUB)
    (python / STUB).chmod(0o755)
    return backends


def prepare_models(repository: Path, run_dir: Path, baseline: bool) -> Path:
    """The repository to serve: all of the build's, or links to all but the baseline."""
    models = run_dir / "models"
    shutil.rmtree(models, ignore_errors=True)
    if baseline:
        return repository.absolute()
    models.mkdir(parents=True)
    for model in repository.absolute().iterdir():
        if (model / "config.pbtxt").is_file() and model.name != "hf_baseline":
            (models / model.name).symlink_to(model)
    return models


def environment(triton: Triton, socket_paths: list[str], gate: Path | None = None) -> dict[str, str]:
    """Environment of the server and its stubs."""
    env = dict(os.environ)
    if gate is not None:
        env[GATE_VARIABLE] = str(gate)
    env[SOCKETS_VARIABLE] = os.pathsep.join(socket_paths)
    env["OMP_NUM_THREADS"] = "1"  # the baseline sets its own number
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["HF_HUB_OFFLINE"] = "1"
    env |= {name: value for name, value in ALLOCATOR.items() if name not in env}
    if triton.in_container:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    else:
        env["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), env.get("PATH", os.defpath)])
        # libpython for the stub, and the wheel's own libraries, which a copied stub no longer finds.
        libraries = [sysconfig.get_config_var("LIBDIR"), str(triton.home.parents[1] / "nvidia_pytriton.libs")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    return env


def command(
    triton: Triton, settings: ServeSettings, models: Path, backends: Path, shm_prefix: str, ranks: int = 1
) -> list[str]:
    """The server's command line; with several ``ranks`` one server for each GPU, of which the first serves."""
    alone = [sys.executable, str(OWN_MEMORY)]
    if ranks == 1:
        return [*alone, *_server(triton, settings, models, backends), _shm(shm_prefix)]
    parts = [*alone, "mpirun", "--allow-run-as-root", "--oversubscribe"]
    renamed = "tensorrt_llm_engine"  # with MODEL_CONTRACT=llmapi
    engine = renamed if (models / renamed).is_dir() else "tensorrt_llm"
    server = _server(triton, settings, models, backends)
    for rank in range(ranks):
        # The others wait inside the engine's start for what the first one tells them; they open no ports.
        follow = ["--model-control-mode=explicit", f"--load-model={engine}"] if rank else []
        mine = [part for part in server if not (rank and part.startswith("--model-control-mode"))]
        where = ["--host", settings.rank_hosts[rank]] if settings.rank_hosts else []
        parts += [*([":"] if rank else []), "-n", "1", *where, *mine, *follow, _shm(f"{shm_prefix}{rank}_")]
    return parts


def _shm(prefix: str) -> str:
    return f"--backend-config=python,shm-region-prefix-name={prefix}"


def _http(port: int) -> list[str]:
    """For this machine alone: bodies end this Triton (docs/SECURITY.md), so a gateway is before it."""
    return ["--http-address=127.0.0.1", f"--http-port={port}"] if port else ["--allow-http=false"]


def _server(triton: Triton, settings: ServeSettings, models: Path, backends: Path) -> list[str]:
    tls = (
        []
        if settings.tls_cert is None
        else [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={settings.tls_cert}",
            f"--grpc-server-key={settings.tls_key}",
        ]
    )
    return [
        str(triton.binary),
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        f"--model-load-thread-count={MODELS_AT_ONCE}",
        *(f"--{door}-address={settings.host}" for door in ("grpc", "metrics")),
        *_http(settings.triton_http_port),
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-port={settings.metrics_port}",
        f"--grpc-restricted-protocol={CLOSED}",
        f"--http-restricted-api={CLOSED}",
        *tls,
        f"--exit-timeout-secs={EXIT_S - 2}",
        "--pinned-memory-pool-byte-size=0",
        "--allow-gpu-metrics=false",
        f"--backend-config=python,shm-default-byte-size={STUB_MEMORY_BYTES}",
    ]
