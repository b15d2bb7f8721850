"""The supervisor: engine processes, one Triton, the gateway: watched and restarted, and an end without remains."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import psutil

from flightline.engine_build.trtllm import versions
from flightline.model_repository.shared.gate import Gate
from flightline.supervisor import engine_process, gateway, probe, remains, triton
from flightline.supervisor.engine_process import EngineProcess
from flightline.supervisor.errors import ServeError
from flightline.supervisor.gateway import GatewayProcess
from flightline.supervisor.probe import EndpointCheck, GrpcPort, HttpPort, Probe, Question, Verdict
from flightline.supervisor.processes import Child, holder_of_port
from flightline.supervisor.remains import Belongings
from flightline.supervisor.settings import ServeSettings, deployed
from flightline.supervisor.trtllm import guard
from flightline.supervisor.trtllm.in_triton import InTriton
from flightline.torch_engine.core.request import ModelInfo
from flightline.torch_engine.process.client import RETRY_S
from flightline.torch_engine.process.routing import Replicas

ENDPOINTS = ("ensemble", "text_generation")
"""What is asked for a token, again and again, where it is served."""
ENGINE_PROCESS = {
    "torch": "flightline.torch_engine.process.server",
    "trtllm-pytorch": "flightline.supervisor.trtllm.server",
}
"""Backend to module; backend trtllm-engine has its engine inside Triton."""
_WATCH_PERIOD_S = 0.25
_LONGEST_BACK_OFF_S = 30.0
_SILENT_PROBES = 3
_SETTLED_S = 0.5
"""So long no request must have been running before a server is drained: the last answers are still on their way."""


class Died(ServeError):
    """One of the processes, while it or another was starting."""


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
        if settings.http_port and not settings.triton_http_port:
            settings = replace(settings, triton_http_port=gateway.private_port())
        self.settings = settings
        self._say = say
        self._triton_home = triton.find()
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._suspicion: str | None = None
        self._lock_file: int | None = None
        self._belongings: Belongings | None = None
        self._gate: Gate | None = None
        self._port: HttpPort | GrpcPort = (
            HttpPort(settings.triton_http_url)
            if settings.triton_http_port
            else GrpcPort(settings.local_grpc_url)
        )
        self._engines: list[EngineProcess] = []
        self._gateways: list[GatewayProcess] = []
        self._client: Replicas | InTriton | None = None
        self._triton: Child | None = None
        self._world_size = 1
        self._watches: list[threading.Thread] = []
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
        """None in backend trtllm-engine."""
        return [engine.child.pid for engine in self._engines if engine.child is not None]

    @property
    def gateway_pids(self) -> list[int]:
        """None where the HTTP port is off."""
        return [process.child.pid for process in self._gateways if process.child is not None]

    @property
    def triton_pid(self) -> int:
        return self.triton_process.pid

    def wait_ready(self, timeout_s: float) -> bool:
        """True as soon as every model answers (again)."""
        return self._ready.wait(timeout_s)

    def start(self) -> None:
        """Returns when real requests were answered through both endpoints.

        Raises:
            ServeError: it cannot start; nothing is left running.
        """
        triton.check_python(self._triton_home)
        self.deployment = deployed(self.settings.build_dir)
        shared = self.deployment.lane == "torch" and self.deployment.world_size > 1
        if shared and self.deployment.device == "cuda" and self.settings.baseline:
            self._say("no baseline: it runs on one GPU, and the engine has the memory of all of its own")
            self.settings = replace(self.settings, baseline=False)
        if self.deployment.lane != "torch":
            self._world_size = guard.check(
                self.deployment.lane, self.deployment.engine_dir, guard.observe(), self.settings.rank_hosts
            )
        try:
            self._lock()
            self._check_ports()
            self._prepare()
            self._start_all()
        except BaseException as error:
            if self._stopping.is_set():  # the ports are open before the last endpoint has answered
                self._drain()
            self._hurry.set()
            self.stop()
            if isinstance(error, OSError):
                raise ServeError(
                    f"cannot write {error.filename or self.settings.run_dir}: {error.strerror}; "
                    "make room or give the right to, then start again"
                ) from None
            raise
        for watch in (self._watch, self._watch_answers):
            thread = threading.Thread(target=watch, name=watch.__name__, daemon=True)
            thread.start()
            self._watches.append(thread)

    def stop(self) -> None:
        """Refuses new requests, lets the running ones end, then ends everything and removes what it left."""
        self._stopping.set()
        self._ready.clear()
        for watch in self._watches[:1]:
            watch.join()  # no restarts from here on
        self._drain()
        # The engines first: whoever was not ready in time gets an error, and Triton has nothing left to wait for.
        for engine in self._engines:
            if engine.child is not None:
                engine.child.stop(5.0, self._hurry)
        if self._triton is not None:
            self._triton.stop(triton.EXIT_S, self._hurry)
        # The gateway last: by now it has passed on what the others had to say.
        self._stop_gateways()
        if self._client is not None:
            self._client.close()
        for watch in self._watches:
            watch.join()
        if self._belongings is not None:
            self._belongings.remove()
            self._belongings = self._gate = None
        self._unlock()

    def _stop_gateways(self) -> None:
        for process in self._gateways:
            process.listener.close()
        for process in self._gateways:
            process.stop(gateway.EXIT_S, self._hurry)
        self._gateways = []

    def _drain(self) -> None:
        """Waits until no request is running, for up to ``drain_s``."""
        if self._gate is None:
            return
        # Before the models refuse, whose refusals leave a client's connection open.
        for process in self._gateways:
            if process.child is not None:
                process.child.signal(gateway.REFUSE)
        self._gate.close()
        deadline = time.monotonic() + self.settings.drain_s
        empty_since: float | None = None
        while (now := time.monotonic()) < deadline and not self._hurry.wait(0.05):
            if not self._gate.empty or (self._client is not None and self._client.stats.active_requests):
                empty_since = None
            elif empty_since is None:
                empty_since = now
            elif now - empty_since >= _SETTLED_S:
                return

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
            owner = path.read_text().split()[:1] or ["unknown"]
            os.close(file)
            raise ServeError(
                f"a server already runs from {self.settings.build_dir} (pid {owner[0]}): stop it first"
            ) from None
        self._lock_file = file
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {psutil.Process().create_time()}".encode())
        remains.sweep(self._say)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.ftruncate(self._lock_file, 0)
            os.close(self._lock_file)
            self._lock_file = None

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
        for log in (run_dir / "triton.log", *map(self._engine_log, range(self.deployment.dp))):
            log.write_bytes(b"")
        self._backends = triton.prepare_backends(self._triton_home, run_dir)
        self._models = triton.prepare_models(
            self.deployment.model_repository, run_dir, self.settings.baseline
        )
        self._check_shared_memory()
        self._belongings = Belongings()
        engines = range(self.deployment.dp)
        self._sockets = [str(self._belongings.folder / f"engine-{number}.sock") for number in engines]
        self._gate_path = self._belongings.folder / "gate"
        self._gate = Gate(self._gate_path)
        if self.settings.http_port:
            self._gateways = gateway.prepare(self.settings, self.deployment, self._belongings.folder)

    def _check_shared_memory(self) -> None:
        stubs = sum(_instances(config.read_text()) for config in self._models.glob("*/config.pbtxt"))
        needed, free = stubs * triton.STUB_MEMORY_BYTES, shutil.disk_usage("/dev/shm").free
        if free < needed:
            raise ServeError(
                f"/dev/shm has {free >> 20} MiB free and the {stubs} processes of Triton's models need {needed >> 20}: "
                "remove what fills it, or give the container more (docker run --shm-size=1g)"
            )

    def _engine_log(self, number: int) -> Path:
        several = self.deployment.dp > 1
        return self.settings.run_dir / (f"engine-{number}.log" if several else "engine.log")

    def _start_all(self) -> None:
        """All load at the same time."""
        self._start_engines()
        self._launch_triton()
        for process in self._gateways:
            process.start()
        self._await_started(self._engines, triton=True)

    def _start_engines(self) -> None:
        """Returns at once; backend trtllm-engine has none."""
        module = ENGINE_PROCESS.get(self.deployment.lane)
        if module is None:
            description = f"TensorRT-LLM engine in Triton, {self.deployment.precision}"
            info = ModelInfo(0, 0, (), str(self.deployment.engine_dir), description)
            self._client = InTriton(f"{self.settings.metrics_url}/metrics", info)
            return
        count = self.deployment.dp
        device, gpus = self.deployment.device, self.deployment.world_size
        shares = [engine_process.share(number, count, device, gpus) for number in range(count)]
        self._client = Replicas(self._sockets)
        for number, (client, share) in enumerate(zip(self._client.engines, shares, strict=True)):
            name = "the engine process" if count == 1 else f"engine process {number + 1} of {count}"
            log, folder = self._engine_log(number), self.deployment.engine_dir
            self._engines.append(EngineProcess(name, module, folder, log, client, share))
        for engine in self._engines:
            engine.start()

    def _await_started(self, engines: list[EngineProcess], triton: bool) -> None:
        """One needs the other: no endpoint is asked before there is an engine behind it."""
        for engine in engines:
            self._await_engine(engine)
        if triton:
            self._await_triton()
        self._stopping.wait(2 * RETRY_S)  # by then all processes of all models have found the engines
        if triton:
            self._await_endpoints()
        self._await_gateways()
        self._ready.set()

    def _await_engine(self, engine: EngineProcess) -> None:
        assert engine.child is not None
        self._await(engine.child, lambda: engine.client.connected)

    @property
    def _endpoints(self) -> list[str]:
        return [endpoint for endpoint in ENDPOINTS if (self._models / endpoint).is_dir()]

    def _launch_triton(self) -> None:
        """Returns at once; nothing is known to be wrong with it until it has had its chance."""
        assert self._belongings is not None
        ranks = self._world_size if self.deployment.lane == versions.ENGINE_LANE else 1
        command = triton.command(
            self._triton_home,
            self.settings,
            self._models,
            self._backends,
            self._belongings.shm_prefix,
            ranks,
        )
        env = triton.environment(self._triton_home, self._sockets, self._gate_path)
        self._triton_folders = remains.triton_folders()
        self._triton = Child("Triton", command, env, self.settings.run_dir / "triton.log")

    def _await_triton(self) -> None:
        assert self._belongings is not None
        self._await(self.triton_process, self._port.ready)
        self._belongings.own_triton_folder(self._triton_folders)
        self._suspicion = None

    def _await_gateways(self) -> None:
        if child := next((each.child for each in self._gateways if each.child is not None), None):
            self._await(child, lambda: gateway.lives(self.settings))

    def _await_endpoints(self) -> None:
        """Until a real request was answered through both endpoints."""
        for endpoint in self._endpoints:
            while not (answer := self._ask(endpoint)).works:
                if not answer.no_engine:
                    self._suspicion = f"model {endpoint} does not answer: {answer.detail.strip()}"
                    raise ServeError(f"{self._suspicion}\n{self.triton_process.tail()}")
                self._stopping.wait(0.1)

    def _ask(self, endpoint: str) -> Probe:
        question = Question(self._port, endpoint, self.settings.start_timeout_s)
        self._await(self.triton_process, lambda: question.answer(0.0) is not None)
        answer = question.answer(0.0)
        assert answer is not None
        return answer

    def _await(self, child: Child, done: Callable[[], bool]) -> None:
        """Until ``child`` is ``done``, while all that were started live."""
        children = [engine.child for engine in self._engines if engine.child is not None]
        children += [self._triton] if self._triton is not None else []
        children += [process.child for process in self._gateways if process.child is not None]
        deadline = time.monotonic() + self.settings.start_timeout_s
        while not done():
            for each in children:
                if each.exit_code is not None:
                    raise Died(f"{each.name} {each.how_it_ended()} at start:\n{each.tail()}")
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
            problems = self._problems()
            if not problems:
                continue
            # Who dies together may be seen to die one after the other.
            self._ready.clear()
            self._stopping.wait(_WATCH_PERIOD_S)
            try:
                self._restart(problems | self._problems())
            except ServeError as error:
                if not self._stopping.is_set():
                    self._say(f"restart failed: {error}")
            except Exception as error:  # no room for a log, say: there may be some the next time
                self._say(f"restart failed: {error!r}")

    def _problems(self) -> dict[str, str]:
        """Name -> what is wrong with it, of all that must be started again."""
        problems = {engine.name: engine.problem() for engine in self._engines}
        problems["Triton"] = self._triton_problem() or ""
        patience_s = self.settings.probe_timeout_s
        problems |= {process.name: process.problem(patience_s) for process in self._gateways}
        return {name: problem for name, problem in problems.items() if problem}

    def _triton_problem(self) -> str | None:
        if self.triton_process.exit_code is not None:
            return f"Triton {self.triton_process.how_it_ended()}"
        if zombies := self.triton_process.zombies():
            return f"a Python stub of Triton has died (pid {zombies[0]}) and Triton never restarts one"
        if self._ready.is_set() and not probe.listens(self.settings.host, self.settings.grpc_port):
            return "Triton has closed its ports and does not end"  # it may hang while it dies of SIGSEGV
        return self._suspicion

    def _restart(self, problems: dict[str, str]) -> None:
        """All at once, with what else dies meanwhile: a killed engine takes a moment to give its memory back."""
        began: dict[str, float] = {}
        while True:
            delay = max(self._back_off[name].next() for name in problems)
            for problem in problems.values():
                self._say(f"{problem}: restarting it" + (f" in {delay:.1f} s" if delay else ""))
            if self._stopping.wait(delay):
                return
            began |= dict.fromkeys(problems, time.monotonic())
            self._start_again(problems)
            try:
                self._await_started([e for e in self._engines if e.name in began], "Triton" in began)
            except Died:
                problems = {name: why for name, why in self._problems().items() if name not in began}
                if not problems:
                    raise
            else:
                break
        for name, start in began.items():
            self._say(f"{name} is back after {time.monotonic() - start:.1f} s")

    def _start_again(self, names: Iterable[str]) -> None:
        """Returns at once."""
        for engine in self._engines:
            if engine.name in names:
                if engine.child is not None:
                    engine.child.stop(0.0)
                engine.start()
        for process in self._gateways:
            if process.name in names:
                process.stop(0.0)
                process.start()
        if "Triton" in names:
            assert self._belongings is not None
            self.triton_process.stop(0.0)
            self._belongings.remove_tritons()
            self._suspicion = "the last restart of Triton failed"  # until this one has not
            self._launch_triton()

    def _watch_answers(self) -> None:
        """Asks for a token now and then; a busy server may take its time, a silent one is looked into."""
        silent = 0
        checks = self._checks()
        while not self._stopping.wait(self.settings.probe_period_s):
            if len(self._engines) > 1 and self._ready.is_set():
                self._look_for_silent_engines()  # the endpoints would not notice: the others get the requests
            for endpoint, check in checks.items():
                if self._stopping.is_set() or not self._ready.is_set():
                    silent, checks = 0, self._checks()
                    break
                if check.overtaken() and not self._look_for_silent_engines():
                    self._suspicion = (
                        f"an instance of model {endpoint} has left a one-token request unanswered"
                    )
                    break
                steps = self.engine.stats.iterations
                answer = check.ask()
                if not self._ready.is_set():
                    continue
                if answer.verdict is Verdict.DEAD:
                    self._suspicion = f"model {endpoint} is dead ({answer.detail.strip()})"
                elif answer.verdict is Verdict.ANSWERED:
                    silent = 0
                else:
                    silent += 1
                    progressed = self.engine.stats.iterations != steps
                    self._look_into_silence(endpoint, check, silent, progressed)

    def _checks(self) -> dict[str, EndpointCheck]:
        return {
            endpoint: EndpointCheck(self._port, endpoint, self.settings.probe_timeout_s)
            for endpoint in self._endpoints
        }

    def _look_into_silence(self, endpoint: str, check: EndpointCheck, silent: int, progressed: bool) -> None:
        """An engine that answers later questions while the endpoint does not shows whose the fault is."""
        if not self._engines:  # it is inside Triton, and cannot be asked by itself
            if progressed and (self.engine.stats.waiting_requests or silent < _SILENT_PROBES):
                return  # busy: the probe waits in the queue like everyone
        elif self._look_for_silent_engines() or not check.waits():
            return
        self._suspicion = f"model {endpoint} has not answered {silent} one-token request(s)"

    def _look_for_silent_engines(self) -> bool:
        """Asks each engine itself, past Triton; True if one does not answer in time. It may be stuck from then on."""
        answers = [engine.answers(self.settings.probe_timeout_s) for engine in self._engines]
        return not all(answers)


def _instances(config: str) -> int:
    """Python processes that Triton starts for a model, from its ``config.pbtxt``."""
    if not re.search(r'^backend: "python"', config, re.M):
        return 0
    return int(found[1]) if (found := re.search(r"instance_group \[ \{ count: (\d+)", config)) else 1
