"""A server to be ill-treated, and streams of known answers beside: what the drills and the soak share.

The server is ``flightline.supervisor.serve`` in a process of its own, on free ports, so that its supervisor can be
killed, too. Its processes are found by the random name of its private folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.client import Client, ClientError  # noqa: E402

ENDPOINTS = ("ensemble", "text_generation")
_NAMES = re.compile(r"flightline[0-9a-f]{8}_|flightline-\w+")
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "The first president of the United States was",
)
START_S = 600.0


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


class StartFailed(Exception):
    """What the server said instead of ``ready``."""


class UnderTest:
    """The server of one build folder; ``start`` it as often as it was ended."""

    def __init__(self, build_dir: Path, run_in: tuple[str, ...] = (), **variables: str) -> None:
        """``run_in`` goes before the command, ``variables`` into its environment."""
        self.build_dir = build_dir
        self.http, self.grpc, self.metrics = free_ports(3)
        self._variables = variables
        self._run_in = run_in
        self.lines: list[str] = []
        """What the supervisor has said."""
        self._before = _triton_folders()
        self._names: set[str] = set()
        """Of its private folders and shared memory."""

    def start(self) -> None:
        """Raises StartFailed."""
        self._ready = threading.Event()
        ports = {"HTTP_PORT": self.http, "GRPC_PORT": self.grpc, "METRICS_PORT": self.metrics}
        env = dict(os.environ) | {name: str(port) for name, port in ports.items()} | self._variables
        command = [*self._run_in, sys.executable, "-m", "flightline.supervisor.serve"]
        self.process = subprocess.Popen(
            [*command, "--build-dir", str(self.build_dir), "--no-baseline"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = len(self.lines)
        reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        reader.start()
        deadline = time.monotonic() + START_S
        while not self._ready.wait(0.05):
            if self.process.poll() is not None:
                reader.join(5)
                raise StartFailed("\n".join(self.lines[said:]))
            if time.monotonic() > deadline:
                raise StartFailed(f"not ready after {START_S:.0f} s")

    def _read(self, lines: object) -> None:
        for line in lines:
            self.lines.append(line.rstrip())
            if line.startswith("ready:"):
                self._ready.set()

    def stop(self) -> float:
        """SIGTERM; seconds until it has ended."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return time.monotonic() - begun

    def end(self) -> None:
        """Stops it if it runs."""
        if self.process.poll() is None:
            self.stop()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    def processes(self) -> dict[str, psutil.Process]:
        """supervisor, engine, triton, the stubs by their model, and ``gateway 0``, ``gateway 1``, ..."""
        found: dict[str, psutil.Process] = {}
        supervisor = psutil.Process(self.process.pid)
        for process in [supervisor, *supervisor.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                self._names.update(_NAMES.findall(words))
                if stub := re.search(r"python_backend_stub \S+/(\w+)/1/model.py", words):
                    found[stub[1]] = process
                elif "bin/tritonserver" in words:
                    found["triton"] = process
                elif "flightline.torch_engine.process.server" in words:
                    found["engine"] = process
                elif "-m flightline.gateway" in words:
                    found[f"gateway {sum(name.startswith('gateway') for name in found)}"] = process
                elif "flightline.supervisor.serve" in words:
                    found["supervisor"] = process
        return found

    def kv_blocks_used(self) -> int | None:
        """None while nobody says."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as page:
                text = page.read().decode()
        except OSError:
            return None
        found = re.search(
            r'^nv_trt_llm_kv_cache_block_metrics\{[^}]*block_type="used"[^}]*\} (\d+)', text, re.M
        )
        return int(found[1]) if found else None

    def left_behind(self) -> list[str]:
        """What this server, in all its lives, has left; ask when it was stopped."""
        left, others = set(), False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and self._is_mine(words):
                    left.add(f"process {process.name()}")
                others |= "bin/tritonserver" in words
        for folder in (Path(tempfile.gettempdir()), Path("/dev/shm")):
            left |= {path.name for path in folder.glob("flightline*") if self._is_mine(path.name)}
        if not others:  # else nobody could tell whose they are
            left |= _triton_folders() - self._before
        return sorted(left)

    def _is_mine(self, words: str) -> bool:
        return any(name in words for name in self._names)


def _triton_folders() -> set[str]:
    return {path.name for path in Path("/tmp").glob("python_env_*")}


@dataclass
class Stream:
    """One request with a known answer."""

    endpoint: str
    prompt: str
    text: str = ""
    error: str = ""
    hung: bool = False
    times: list[float] = field(default_factory=list)
    """When its messages came, on the monotonic clock."""


def ask(url: str, endpoint: str, prompt: str, tokens: int, timeout_s: float = 60.0) -> Stream:
    """One streamed greedy answer, to its end or its error."""
    stream = Stream(endpoint, prompt)
    _read(url, stream, tokens, timeout_s, threading.Event())
    return stream


def _read(url: str, stream: Stream, tokens: int, timeout_s: float, begun: threading.Event) -> None:
    try:
        with Client(url, stream.endpoint, timeout_s=timeout_s) as client:
            for chunk in client.generate_stream(stream.prompt, max_tokens=tokens, end_id=-1):
                stream.times.append(time.monotonic())
                stream.text += chunk.text
                begun.set()
    except ClientError as error:
        stream.hung = "no complete answer" in str(error)
        stream.error = str(error)
    finally:
        begun.set()


class Streams:
    """Several at once; known answers are what the quiet server has said."""

    def __init__(self, url: str, tokens: int, each: int, timeout_s: float = 60.0) -> None:
        """``each`` streams on each endpoint."""
        self.streams = [
            Stream(endpoint, PROMPTS[number % len(PROMPTS)])
            for endpoint in ENDPOINTS
            for number in range(each)
        ]
        begun = [threading.Event() for _ in self.streams]
        self._threads = [
            threading.Thread(target=_read, args=(url, stream, tokens, timeout_s, event), daemon=True)
            for stream, event in zip(self.streams, begun, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        for event in begun:
            event.wait()

    def join(self) -> list[Stream]:
        for thread in self._threads:
            thread.join()
        return self.streams


def known_answers(url: str, tokens: int) -> dict[str, str]:
    """Prompt -> text, of a quiet server; both endpoints must agree.

    Raises:
        StartFailed: they do not, or one does not answer.
    """
    known = {}
    for prompt in PROMPTS:
        answers = [ask(url, endpoint, prompt, tokens) for endpoint in ENDPOINTS]
        if any(answer.error for answer in answers) or answers[0].text != answers[1].text:
            raise StartFailed(f"the endpoints do not agree on {prompt!r}: {answers}")
        known[prompt] = answers[0].text
    return known
