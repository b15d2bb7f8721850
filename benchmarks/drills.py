"""What a fault costs: kills, freezes, full memory and disks, one after the other, on a real server at work.

``python3 benchmarks/drills.py [--build-dir DIR] [--only NAME ...] [--out FILE.md]``

For each fault a table row says what the requests in flight got (four streams on each endpoint), after how many seconds
both endpoints gave a right answer again, and what was left behind when the server was stopped then. Ends with status 1
if a stream hung or changed, no right answer came or not within its limit, or something was left. About a quarter of an
hour; needs a build and a machine without other servers. Full /dev/shm and full disk need root: they happen on small
file systems that only the server sees (``unshare --mount``).
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from under_test import ENDPOINTS, PROMPTS, ROOT, StartFailed, Stream, Streams, UnderTest, ask, known_answers

SHORT, EACH = 8, 4
PATIENCE_S = 180.0
QUIET = ", no load"
LIMITS_S = {"kill -9 engine and Triton": 12.0, f"SIGSEGV Triton{QUIET}": 8.0, "HTTP: ": 8.0}
"""Beginnings of names of drills, and seconds until a right answer must be back, on a machine that does nothing else."""


@dataclass
class Row:
    fault: str
    streams: list[Stream]
    known: dict[str, str]
    right_after_s: float | None
    left: list[str]
    note: str = ""

    @property
    def outcomes(self) -> str:
        counts = Counter(self._outcome(stream) for stream in self.streams)
        return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "-"

    def _outcome(self, stream: Stream) -> str:
        if stream.hung:
            return "HUNG"
        if stream.error:
            return "error"
        return "whole" if stream.text == self.known[stream.prompt] else "CHANGED"

    @property
    def limit_s(self) -> float:
        return next((limit for name, limit in LIMITS_S.items() if self.fault.startswith(name)), PATIENCE_S)

    @property
    def late(self) -> bool:
        return self.right_after_s is None or self.right_after_s > self.limit_s

    @property
    def failed(self) -> bool:
        return any(word in self.outcomes for word in ("HUNG", "CHANGED")) or self.late or bool(self.left)

    def __str__(self) -> str:
        after = "never" if self.right_after_s is None else f"{self.right_after_s:.1f}"
        if self.limit_s < PATIENCE_S:
            after += f" ({'more than' if self.late else 'at most'} {self.limit_s:g})"
        left = ", ".join(self.left) or "nothing"
        return f"| {self.fault} | {self.outcomes} | {after} | {left} | {self.note} |"


class Drills:
    """One server, and what is done to it."""

    def __init__(self, server: UnderTest, tokens: int) -> None:
        """Starts the server; raises StartFailed."""
        self.server = server
        self.tokens = tokens
        self._begun = 0.0
        """When the fault came."""
        self.server.start()
        self.known = known_answers(self.server.url, tokens)
        self.short = known_answers(self.server.url, SHORT)

    # -- faults: each returns a note -----------------------------------------------------------------

    def kill(self, *names: str, number: signal.Signals = signal.SIGKILL) -> Callable[[], str]:
        def fault() -> str:
            processes = self.server.processes()
            for name in names:
                processes[name].send_signal(number)
            if number != signal.SIGSTOP:  # while it dies of SIGSEGV, Triton still answers
                psutil.wait_procs([processes[name] for name in names], timeout=5)
            return ""

        return fault

    def kill_supervisor(self) -> str:
        os.kill(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()
        self.server.start()
        return "started again by hand; it ends what was left"

    def five_kills(self) -> str:
        for _ in range(5):
            self.server.processes()["engine"].kill()
            self.until_right()
        return "killed again as soon as it answered"

    def body(self, data: bytes, encoding: str = "") -> Callable[[], str]:
        def fault() -> str:
            extra = f"Content-Encoding: {encoding}\r\n" if encoding else ""
            head = "POST /v2/models/ensemble/generate HTTP/1.1\r\nHost: a\r\n"
            head += f"{extra}Content-Length: {len(data)}\r\n\r\n"
            old = self.server.processes()["triton"].pid
            try:
                with socket.create_connection(("127.0.0.1", self.server.http), 60) as connection:
                    connection.sendall(head.encode() + data)
                    answer = connection.recv(200).split(b"\r\n")[0].decode()
            except OSError as error:
                answer = str(error)
            time.sleep(0.5)
            now = self.server.processes().get("triton")
            return f"HTTP: {answer or 'closed'}; Triton {'lived' if now and now.pid == old else 'died'}"

        return fault

    def vanishing_clients(self) -> str:
        """Sixteen processes with a stream each, killed in the middle."""
        program = (
            "from client import Client\nimport sys\n"
            "for chunk in Client(sys.argv[1], sys.argv[2]).generate_stream('Once', max_tokens=1000, end_id=-1):\n"
            "    print(1, flush=True)"
        )
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", program, self.server.url, ENDPOINTS[number % 2]],
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            for number in range(16)
        ]
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
        self._begun = time.monotonic()
        for client in clients:
            client.kill()
            client.wait()
        while self.server.kv_blocks_used() != 0 and time.monotonic() - self._begun < PATIENCE_S:
            time.sleep(0.1)
        return f"KV blocks used: {self.server.kv_blocks_used()} after {time.monotonic() - self._begun:.1f} s"

    # -- the course of a drill -----------------------------------------------------------------------

    def until_right(self) -> float | None:
        """Seconds until both endpoints have given a right answer; None if they never do."""
        begun = time.monotonic()
        open_endpoints = list(ENDPOINTS)
        while open_endpoints and time.monotonic() - begun < PATIENCE_S:
            answer = ask(self.server.url, open_endpoints[0], PROMPTS[0], SHORT, timeout_s=10.0)
            if answer.text == self.short[PROMPTS[0]] and not answer.error:
                open_endpoints.pop(0)
            else:
                time.sleep(0.1)
        return None if open_endpoints else time.monotonic() - begun

    def drill(self, name: str, fault: Callable[[], str]) -> Row:
        self.server.processes()  # whose names it learns
        streams = Streams(self.server.url, self.tokens, 0 if name.endswith(QUIET) else EACH)
        self._begun = time.monotonic()
        note = fault()
        right = self.until_right()
        after = None if right is None else time.monotonic() - self._begun
        finished = streams.join()
        self.server.processes()  # those of now, too
        # Each fault meets a fresh server, whose supervisor does not hold back because of the ones before.
        self.server.stop()
        left = self.server.left_behind()
        self.server.start()
        return Row(name, finished, self.known, after, left, note)

    def stop_under_load(self) -> Row:
        self.server.processes()
        streams = Streams(self.server.url, self.tokens, EACH)
        self.server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        time.sleep(0.3)
        late = ask(self.server.url, ENDPOINTS[0], PROMPTS[0], SHORT)
        finished = streams.join()
        self.server.process.wait()
        took = time.monotonic() - begun
        left = self.server.left_behind()
        self.server.start()
        right = self.until_right()
        note = f"ended after {took:.1f} s; a new request: {late.error[:40] or 'answered'}"
        return Row(
            "SIGTERM under load", finished, self.known, right, left, note + "; seconds count from a new start"
        )

    def faults(self) -> dict[str, Callable[[], str]]:
        stubs = ("preprocessing", "tensorrt_llm", "postprocessing", "text_generation")
        found: dict[str, Callable[[], str]] = {"kill -9 engine": self.kill("engine")}
        found["kill -9 Triton"] = self.kill("triton")
        found["SIGSEGV Triton"] = self.kill("triton", number=signal.SIGSEGV)
        found[f"SIGSEGV Triton{QUIET}"] = self.kill("triton", number=signal.SIGSEGV)
        for stub in stubs:
            found[f"kill -9 stub {stub}"] = self.kill(stub)
        found["kill -9 engine and Triton"] = self.kill("engine", "triton")
        found["kill -9 engine and stub tensorrt_llm"] = self.kill("engine", "tensorrt_llm")
        found["kill -9 supervisor"] = self.kill_supervisor
        found["SIGSTOP engine"] = self.kill("engine", number=signal.SIGSTOP)
        found["SIGSTOP stub text_generation"] = self.kill("text_generation", number=signal.SIGSTOP)
        found["five kills of the engine in a row"] = self.five_kills
        found["sixteen clients vanish"] = self.vanishing_clients
        found["HTTP: 2,000,000 nested ["] = self.body(
            b'{"max_tokens": 1, "text_input": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}"
        )
        found["HTTP: 24 MB of JSON"] = self.body(
            b'{"text_input": "' + b"a" * (24 << 20) + b'", "max_tokens": 1}'
        )
        bomb = b'{"text_input": "' + b"a" * (800 << 20) + b'", "max_tokens": 1}'
        found["HTTP: gzip body of 800 MB"] = self.body(gzip.compress(bomb, 9), "gzip")
        return found


def confined(build_dir: Path, what: str, tokens: int) -> Row:
    """Fills /dev/shm or the disk of a server that has small ones to itself."""
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        build = Path(folder) / "build"
        build.mkdir()
        shutil.copy(build_dir / "deployment.json", build)
        (build / "run").mkdir()
        mounts = "mount -t tmpfs -o size=160m tmpfs /dev/shm && mount -t tmpfs -o size=64m tmpfs " + str(
            build / "run"
        )
        server = UnderTest(build, run_in=("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"))
        server.start()
        known, short = known_answers(server.url, tokens), known_answers(server.url, SHORT)
        inside = Path(f"/proc/{server.process.pid}/root")
        place = inside / ("dev/shm" if what == "/dev/shm" else str(build / "run").lstrip("/"))
        streams = Streams(server.url, tokens, EACH)
        filler = place / "filler"
        with filler.open("wb") as file:
            try:
                while file.write(bytes(1 << 20)):
                    file.flush()
            except OSError:
                pass  # full
        big = ask(
            server.url, "text_generation", "a " * 12_000_000 if what == "/dev/shm" else PROMPTS[0], SHORT
        )
        if what == "disk":
            server.processes()["engine"].kill()
        begun = time.monotonic()
        right = None
        while right is None and time.monotonic() - begun < PATIENCE_S:
            answers = [ask(server.url, endpoint, PROMPTS[0], SHORT, timeout_s=10.0) for endpoint in ENDPOINTS]
            if all(answer.text == short[PROMPTS[0]] for answer in answers):
                right = time.monotonic() - begun
            time.sleep(0.1)
        finished = streams.join()
        note = "while full: " + (
            f"a 24 MB prompt: {big.error[:60]}" if what == "/dev/shm" else "engine killed"
        )
        server.processes()
        server.stop()
        return Row(f"full {what}", finished, known, right, server.left_behind(), note)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--only", nargs="+", default=[], help="words of the names of the drills to do")
    parser.add_argument("--tokens", type=int, default=150, help="of each stream in flight (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too

    def wanted(name: str) -> bool:
        return not options.only or any(word in name for word in options.only)

    rows: list[Row] = []
    lines = [
        "| fault | eight streams in flight | right answer after, s | left behind | |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)

    def done(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)

    server = UnderTest(options.build_dir)
    try:
        try:
            drills = Drills(server, options.tokens)
            for name, fault in drills.faults().items():
                if wanted(name):
                    done(drills.drill(name, fault))
            if wanted("SIGTERM under load"):
                done(drills.stop_under_load())
        finally:
            server.end()
        for what in ("/dev/shm", "disk"):
            if wanted(f"full {what}"):
                if os.geteuid():
                    print(f"| full {what} | not done: needs root | | | |", flush=True)
                else:
                    done(confined(options.build_dir, what, options.tokens))
    except StartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text("\n".join([*lines, *map(str, rows)]) + "\n", encoding="utf-8")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
