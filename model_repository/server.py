"""The supervisor: the engine processes and one Triton, watched and restarted, and an end without remains."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil

from model_repository import engine_process, probe, triton
from model_repository.engine_process import EngineProcess
from model_repository.errors import ServeError
from model_repository.probe import Doorbell, Verdict
from model_repository.processes import Child, holder_of_port
from model_repository.settings import Deployment, ServeSettings
from model_repository.trtllm import guard, versions
from model_repository.trtllm.in_triton import InTriton
from torch_engine.replicas import Replicas
from torch_engine.request import ModelInfo

DOORS = ("ensemble", "text_generation")
"""What is asked for a token, again and again, where it is served."""
ENGINE_PROCESS = {"torch": "torch_engine.server", "trtllm-pytorch": "model_repository.trtllm.server"}
"""Lane to module; lane trtllm-engine has its engine inside Triton."""
_WATCH_PERIOD_S = 0.25
_LONGEST_BACK_OFF_S = 30.0
_SILENT_PROBES = 3


class BackOff:
    """Waiting time before a restart: none at first, then doubling, until a run lasted a minute."""

    def __init__(self) -> None:
        self._delay = 0.0
        self._last = 0.0

    def next(self) -> float:
        now = time.monotonic()
        self._delay = 0.0 if now - self._last > 60 else min(max(0.5, self._delay * 2), _LONGEST_BACK_OFF_S)
        self._last = now
        return self._delay


class Server:
    """A running deployment.

        with Server(ServeSettings()) as server:
            ...  # server.settings.grpc_url answers

    ``say`` gets one line for each thing that a user should know.
    """

    def __init__(self, settings: ServeSettings, say: Callable[[str], None] = lambda line: None) -> None:
        self.settings = settings
        self._say = say
        self._triton_home = triton.find()
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._suspicion: str | None = None
        self._lock_file: int | None = None
        self._socket_dir: Path | None = None
        self._engines: list[EngineProcess] = []
        self._client: Replicas | InTriton | None = None
        self._triton: Child | None = None
        self._world_size = 1
        self._shm_prefix = f"flightline{uuid.uuid4().hex[:8]}_"
        self._threads: list[threading.Thread] = []
        self._back_off: defaultdict[str, BackOff] = defaultdict(BackOff)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def engine(self) -> Replicas | InTriton:
        """The facts of the engine, or of several as one, and their statistics."""
        assert self._client is not None, "start() first"
        return self._client

    @property
    def triton_process(self) -> Child:
        assert self._triton is not None, "start() first"
        return self._triton

    @property
    def engine_pids(self) -> list[int]:
        """None in lane trtllm-engine."""
        return [engine.child.pid for engine in self._engines if engine.child is not None]

    @property
    def triton_pid(self) -> int:
        return self.triton_process.pid

    def wait_ready(self, timeout_s: float) -> bool:
        """True as soon as every model answers (again)."""
        return self._ready.wait(timeout_s)

    def start(self) -> None:
        """Returns when real requests were answered through both doors.

        Raises:
            ServeError: it cannot start; nothing is left running.
        """
        triton.check_python(self._triton_home)
        self.deployment = Deployment.load(self.settings.build_dir)
        if self.deployment.lane != "torch":
            self._world_size = guard.check(self.deployment.lane, self.deployment.engine_dir, guard.observe())
        try:
            self._lock()
            self._check_ports()
            self._prepare()
            self._start_engines()
            self._start_triton()
        except BaseException:
            self._hurry.set()
            self.stop()
            raise
        for watch in (self._watch, self._watch_answers):
            thread = threading.Thread(target=watch, name=watch.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Lets requests drain, then ends everything and removes what it left."""
        self._stopping.set()
        self._ready.clear()
        for thread in self._threads:
            thread.join()
        if self._triton is not None:
            self._triton.stop(self.settings.drain_s, self._hurry)
        self._remove_shared_memory()
        if self._client is not None:
            self._client.close()
        for engine in self._engines:
            if engine.child is not None:
                engine.child.stop(5.0, self._hurry)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        self._unlock()

    def abandon_start(self) -> None:
        """Makes a ``start`` that is under way give up."""
        self._stopping.set()

    def hurry(self) -> None:
        """Ends the patience of a ``stop`` that is under way."""
        self._hurry.set()

    # -- start ---------------------------------------------------------------------------------------

    def _lock(self) -> None:
        run_dir = self.settings.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "serve.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text().strip() or "unknown"
            os.close(file)
            raise ServeError(
                f"a server already runs from {self.settings.build_dir} (pid {owner}): stop it first"
            ) from None
        self._lock_file = file
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        self._end_leftovers()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            (self.settings.run_dir / "marks.json").unlink(missing_ok=True)
            os.ftruncate(self._lock_file, 0)
            os.close(self._lock_file)
            self._lock_file = None

    def _end_leftovers(self) -> None:
        """Ends what a supervisor that was killed could not end."""
        path = self.settings.run_dir / "marks.json"
        try:
            left = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        ended = []
        for process in psutil.process_iter():
            try:
                # Random names on the command line tell ours from others, and from reused process ids.
                if any(
                    left[name] in word for word in process.cmdline() for name in ("shm_prefix", "socket_dir")
                ):
                    self._say(
                        f"ending {process.name()} (pid {process.pid}), left by a server that was killed"
                    )
                    process.kill()
                    ended.append(process)
            except psutil.Error:
                pass
        psutil.wait_procs(ended, timeout=10)
        for name in Path("/dev/shm").glob(left["shm_prefix"] + "*"):
            name.unlink(missing_ok=True)
        shutil.rmtree(left["socket_dir"], ignore_errors=True)
        path.unlink()

    def _check_ports(self) -> None:
        for variable, port in self.settings.ports.items():
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind((self.settings.host, port))
                except OSError as error:
                    raise ServeError(
                        f"port {port} is taken by {holder_of_port(port)} ({error.strerror}): "
                        f"set {variable} to a free one"
                    ) from None

    def _prepare(self) -> None:
        run_dir = self.settings.run_dir
        for log in (run_dir / "triton.log", *map(self._engine_log, range(self.deployment.engines))):
            log.write_bytes(b"")
        self._backends = triton.prepare_backends(self._triton_home, run_dir)
        self._models = triton.prepare_models(
            self.deployment.model_repository, run_dir, self.settings.baseline
        )
        # A Unix socket's path may have 107 bytes; the build folder's may be longer.
        self._socket_dir = Path(tempfile.mkdtemp(prefix="flightline-"))
        engines = range(self.deployment.engines)
        self._sockets = [str(self._socket_dir / f"engine-{number}.sock") for number in engines]
        marks = {"shm_prefix": self._shm_prefix, "socket_dir": str(self._socket_dir)}
        (run_dir / "marks.json").write_text(json.dumps(marks))

    def _engine_log(self, number: int) -> Path:
        several = self.deployment.engines > 1
        return self.settings.run_dir / (f"engine-{number}.log" if several else "engine.log")

    def _start_engines(self) -> None:
        """All at once: a large model takes its time to load."""
        module = ENGINE_PROCESS.get(self.deployment.lane)
        if module is None:
            description = f"TensorRT-LLM engine in Triton, {self.deployment.precision}"
            info = ModelInfo(0, 0, (), str(self.deployment.engine_dir), description)
            self._client = InTriton(f"{self.settings.metrics_url}/metrics", info)
            return
        count = self.deployment.engines
        shares = [engine_process.share(number, count, self.deployment.device) for number in range(count)]
        self._client = Replicas(self._sockets)
        for number, (client, share) in enumerate(zip(self._client.engines, shares, strict=True)):
            name = "the engine process" if count == 1 else f"engine process {number + 1} of {count}"
            log, folder = self._engine_log(number), self.deployment.engine_dir
            self._engines.append(EngineProcess(name, module, folder, log, client, share))
        for engine in self._engines:
            engine.start()
        for engine in self._engines:
            self._await_engine(engine)

    def _await_engine(self, engine: EngineProcess) -> None:
        assert engine.child is not None
        self._await(engine.child, lambda: engine.client.connected)

    @property
    def _doors(self) -> list[str]:
        return [door for door in DOORS if (self._models / door).is_dir()]

    def _start_triton(self) -> None:
        command = triton.command(
            self._triton_home,
            self.settings,
            self._models,
            self._backends,
            self._shm_prefix,
            self._world_size if self.deployment.lane == versions.ENGINE_LANE else 1,
        )
        env = triton.environment(self._triton_home, self._sockets)
        self._triton = Child("Triton", command, env, self.settings.run_dir / "triton.log")
        self._await(self._triton, lambda: probe.ready(self.settings.http_url))
        for door in self._doors:
            answer = probe.generate(self.settings.http_url, door, self.settings.start_timeout_s)
            if not answer.served:
                raise ServeError(f"model {door} does not answer: {answer.detail}\n{self._triton.tail()}")
        self._suspicion = None
        self._ready.set()

    def _await(self, child: Child, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.settings.start_timeout_s
        while not done():
            if child.exit_code is not None:
                raise ServeError(f"{child.name} {child.how_it_ended()} at start:\n{child.tail()}")
            if time.monotonic() > deadline:
                patience = self.settings.start_timeout_s
                raise ServeError(f"{child.name} was not ready after {patience:.0f} s:\n{child.tail()}")
            if self._stopping.is_set():
                raise ServeError("stopped while starting")
            time.sleep(0.05)

    # -- watch ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Restarts what has died."""
        while not self._stopping.wait(_WATCH_PERIOD_S):
            try:
                if broken := next((engine for engine in self._engines if engine.problem()), None):
                    self._restart_engine(broken)
                elif reason := self._triton_problem():
                    self._restart_triton(reason)
            except ServeError as error:
                self._say(f"restart failed: {error}")

    def _triton_problem(self) -> str | None:
        if self.triton_process.exit_code is not None:
            return f"Triton {self.triton_process.how_it_ended()}"
        if zombies := self.triton_process.zombies():
            return f"a Python stub of Triton has died (pid {zombies[0]}) and Triton never restarts one"
        return self._suspicion

    def _restart_engine(self, engine: EngineProcess) -> None:
        self._ready.clear()
        if self._back_out(engine.name, engine.problem()):
            return
        started = time.monotonic()
        if engine.child is not None:
            engine.child.stop(0.0)
        engine.start()
        self._await_engine(engine)
        self._ready.set()
        self._say(f"{engine.name} is back after {time.monotonic() - started:.1f} s")

    def _restart_triton(self, reason: str) -> None:
        self._ready.clear()
        if self._back_out("triton", reason):
            return
        started = time.monotonic()
        self.triton_process.stop(0.0)
        self._remove_shared_memory()
        self._suspicion = "the last restart of Triton failed"  # until this one has not
        self._start_triton()
        self._say(f"Triton is back after {time.monotonic() - started:.1f} s")

    def _back_out(self, what: str, reason: str) -> bool:
        """Says what happens and waits its time; True if the server is stopping meanwhile."""
        delay = self._back_off[what].next()
        self._say(f"{reason}: restarting it" + (f" in {delay:.1f} s" if delay else ""))
        return self._stopping.wait(delay)

    def _watch_answers(self) -> None:
        """Asks for a token now and then; a busy server may take its time, a silent one is looked into."""
        silent = 0
        bells = self._doorbells()
        while not self._stopping.wait(self.settings.probe_period_s):
            if len(self._engines) > 1 and self._ready.is_set():
                self._look_for_stuck_engines()  # the doors would not notice: the others get the requests
            for door, bell in bells.items():
                if self._stopping.is_set() or not self._ready.is_set():
                    silent, bells = 0, self._doorbells()
                    break
                if bell.overtaken():
                    self._suspicion = f"an instance of model {door} has left a one-token request unanswered"
                    break
                steps = self.engine.stats.iterations
                answer = bell.ring()
                if not self._ready.is_set():
                    continue
                if answer.verdict is Verdict.DEAD:
                    self._suspicion = f"model {door} is dead ({answer.detail.strip()})"
                elif answer.verdict is Verdict.ANSWERED:
                    silent = 0
                else:
                    silent += 1
                    self._look_into_silence(door, silent, progressed=self.engine.stats.iterations != steps)

    def _doorbells(self) -> dict[str, Doorbell]:
        settings = self.settings
        return {door: Doorbell(settings.http_url, door, settings.probe_timeout_s) for door in self._doors}

    def _look_into_silence(self, door: str, silent: int, progressed: bool) -> None:
        if progressed and (self.engine.stats.waiting_requests or silent < _SILENT_PROBES):
            return  # busy: the probe waits in the queue like everyone
        if progressed or not self._look_for_stuck_engines():
            self._suspicion = f"model {door} has not answered {silent} one-token request(s)"

    def _look_for_stuck_engines(self) -> bool:
        """Asks each engine itself, past Triton; True if one does not answer."""
        silent = False
        for engine in self._engines:
            steps = engine.client.stats.iterations
            if probe.engine_answers(engine.client, self.settings.probe_timeout_s):
                continue
            silent = True
            if engine.client.connected and engine.client.stats.iterations == steps:
                engine.stuck = True
        return silent

    def _remove_shared_memory(self) -> None:
        for name in Path("/dev/shm").glob(self._shm_prefix + "*"):
            name.unlink(missing_ok=True)
