"""``flightline serve``, after the build: runs the server until Ctrl-C.

flightline serve                        # from build/, ports 8000, 8001, 8002
flightline serve --detach               # returns when it is ready
flightline serve --stop                 # ends a detached one
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading
import time

import psutil

from flightline.supervisor.errors import ServeError
from flightline.supervisor.server import Server
from flightline.supervisor.settings import ServeSettings, parse
from flightline.torch_engine.process.log import logger

__all__ = ["ServeError", "ServeSettings", "Server", "main"]


def _say(line: str) -> None:
    logger("serve", sys.stdout).info("%s", line)


def ready_message(server: Server) -> str:
    """What a user can do now."""
    settings, deployment = server.settings, server.deployment
    chat = (
        "make chat"
        if settings.grpc_port == ServeSettings.grpc_port
        else f"make chat GRPC_PORT={settings.grpc_port}"
    )
    engine = server.engine.info.description or deployment.precision
    if deployment.dp > 1:
        engine = f"{deployment.dp} engines, each {engine}"
    served = {path.name for path in deployment.model_repository.iterdir()}
    if "ensemble" in served:
        models = "text_generation, ensemble, tensorrt_llm_bls"
    else:
        models = "text_generation, tensorrt_llm (llmapi)"
    question = '{"text_input": "What is ML?", "max_tokens": 20}'
    curl = f"curl -d '{question}' {settings.http_url}/v2/models/text_generation/generate"
    models += ", hf_baseline" if settings.baseline else ""
    return "\n".join(
        [
            "",
            f"ready: {deployment.model} ({engine})",
            f"  models   {models}",
            f"  gRPC     {settings.grpc_url}",
            f"  HTTP     {settings.http_url}  (OpenAI: /v1, Triton: /v2, a page to chat: /)"
            if settings.http_port
            else "  HTTP     off",
            f"  metrics  http://{settings.host}:{settings.metrics_port}/metrics",
            f"  logs     {settings.run_dir}",
            "",
            *([f"try   {curl}"] if settings.http_port else []),
            f"next  make loadtest (web UI), {chat}; Ctrl-C stops the server, then make bench compares the endpoints",
            "",
        ]
    )


def serve(settings: ServeSettings) -> int:
    """Runs until SIGINT or SIGTERM; a second one ends it at once."""
    server = Server(settings, say=_say)
    asked = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set():
            server.hurry()
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    threading.Thread(target=_abandon_start_when, args=(asked, server), daemon=True).start()
    _say(f"starting {settings.build_dir} (up to {settings.start_timeout_s:.0f} s)")
    try:
        server.start()
    except ServeError:
        if asked.is_set():
            _say("stopped")
            return 130
        raise
    print(ready_message(server), flush=True)
    (settings.run_dir / "ready").touch()
    asked.wait()
    _say(f"stopping (requests get up to {settings.drain_s:.0f} s; Ctrl-C again ends them now)")
    (settings.run_dir / "ready").unlink(missing_ok=True)
    server.stop()
    _say("stopped")
    return 0


def _abandon_start_when(asked: threading.Event, server: Server) -> None:
    asked.wait()
    server.abandon_start()


def detach(settings: ServeSettings, arguments: list[str]) -> int:
    """Starts a server in the background and returns when it is ready."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / "ready").unlink(missing_ok=True)
    log = settings.run_dir / "serve.log"
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "flightline.supervisor.serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    while not (settings.run_dir / "ready").exists():
        if child.poll() is not None:
            sys.stderr.write(log.read_text())
            return child.returncode or 1
        time.sleep(0.1)
    sys.stdout.write(log.read_text())
    return 0


def stop_detached(settings: ServeSettings) -> int:
    """Ends the server that runs from this build folder."""
    process = running(settings)
    if process is None:
        _say(f"no server runs from {settings.build_dir}")
        return 0
    process.terminate()
    patience = settings.drain_s + 30
    try:
        process.wait(patience)
    except psutil.TimeoutExpired:
        raise ServeError(
            f"the server (pid {process.pid}) has not ended after {patience:.0f} s: see {settings.run_dir}"
        ) from None
    _say("stopped")
    return 0


def running(settings: ServeSettings) -> psutil.Process | None:
    """The server that runs from this build folder: it holds the lock, and is the process that wrote its name there.

    The name alone may be that of a server that was killed, and its process id another's by now.
    """
    try:
        with (settings.run_dir / "serve.lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, started = lock.read().split()
                process = psutil.Process(int(pid))
                return process if process.create_time() == float(started) else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        pass
    return None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            logger("serve")
        except ValueError as error:
            raise ServeError(str(error)) from None
        options, settings = parse(arguments)
        if options.stop:
            return stop_detached(settings)
        if options.detach:
            return detach(settings, [word for word in arguments if word != "--detach"])
        return serve(settings)
    except ServeError as error:
        print(f"serve: error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        where = error.filename or "the build folder"
        print(
            f"serve: error: {where}: {error.strerror}: free some space or check its permissions",
            file=sys.stderr,
            flush=True,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
