"""A rehearsal of many machines on one: two workers of ours behind Dynamo's frontend, real etcd, OpenAI's SDK.

``DYNAMO/bin/python benchmarks/dynamo.py [--build-dir DIR] [--only migration|routing] [--discovery etcd|file]``

Run by the Python of the environment that has Dynamo (docs/SCALE.md), needs a build, and Debian's ``etcd-server`` unless
``--discovery file``.

* migration: conversations of two turns, many at once, four times: undisturbed, with one worker and its engine killed
  (SIGKILL) in the middle, with only its engine killed, and with one told to end (SIGTERM). Every request must end with
  the text of the first round.
* routing: long conversations turn by turn, once with the router by KV cache and once round robin, each with fresh
  workers: output tokens/s of both.

Ends with status 1 if a request was lost or changed, or routing by KV cache gave less than ``LEAST_GAIN`` times the
tokens/s of round robin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil

PATIENCE_S = 180.0
LEAST_GAIN = 1.2
WORKERS = 2
WORDS = [
    "river",
    "stone",
    "music",
    "winter",
    "garden",
    "paper",
    "engine",
    "window",
    "morning",
    "silver",
    "bridge",
    "letter",
]


@dataclass
class Fleet:
    """What runs, by name."""

    url: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def kill_engine(self, name: str) -> None:
        """The engine alone: its worker is there to say so."""
        for process in psutil.Process(self.processes[name].pid).children():
            _end(process.pid)

    def end_worker(self, name: str) -> None:
        """As Kubernetes ends a pod."""
        self.processes[name].terminate()

    def kill_worker(self, name: str) -> None:
        """With its engine, as if the machine had gone: neither says good-bye."""
        _end(self.processes[name].pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def fleet(build_dir: str, mode: str, discovery: str, folder: Path) -> Iterator[Fleet]:
    """Two workers and a frontend, ready; ended with all that they started."""
    env = dict(os.environ) | {"DYN_LOG": "warn", "DYN_SYSTEM_PORT": "-1", "OMP_NUM_THREADS": "1"}
    http = free_port()
    running = Fleet(f"http://127.0.0.1:{http}")

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            running.processes[name] = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    try:
        if discovery == "etcd":
            client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
            etcd = shutil.which("etcd")
            if etcd is None:
                sys.exit("error: etcd is not installed: apt-get install etcd-server, or use --discovery file")
            urls = ["--listen-client-urls", client, "--advertise-client-urls", client]
            urls += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            start(
                "etcd",
                etcd,
                "--data-dir",
                str(folder / "etcd"),
                *urls,
                "--initial-cluster",
                f"default={peer}",
            )
            env["ETCD_ENDPOINTS"] = client
        else:
            env["DYN_FILE_KV"] = str(folder / "discovery")
        plane = ["--discovery-backend", discovery, "--event-plane", "zmq"]
        for number in range(WORKERS):
            log = str(folder / f"engine-{number}.log")
            options = ["--build-dir", build_dir, "--log", log, *plane]
            start(f"worker-{number}", sys.executable, "-m", "flightline.dynamo_worker", *options)
        options = ["--http-port", str(http), "--router-mode", mode, "--migration-limit", "3", *plane]
        start("frontend", sys.executable, "-m", "dynamo.frontend", *options)
        _await_workers(running, folder)
        yield running
    finally:
        for process in running.processes.values():
            _end(process.pid)


def _await_workers(running: Fleet, folder: Path) -> None:
    """Until the frontend knows all of them: its health page lists their endpoints."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for name, process in running.processes.items():
            if process.poll() is not None:
                sys.exit(f"error: {name} has ended:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{running.url}/health", timeout=2) as answer:
                known = json.load(answer).get("instances", [])
            with urllib.request.urlopen(f"{running.url}/v1/models", timeout=2) as answer:
                models = json.load(answer)["data"]
            if models and sum(each.get("endpoint") == "generate" for each in known) == WORKERS:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    sys.exit("error: the frontend does not know both workers")


def _end(pid: int) -> None:
    """SIGKILL to a process and all that it has started."""
    try:
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            process.kill()
    except psutil.NoSuchProcess:
        pass


@dataclass
class Load:
    """Conversations: each user message follows the answer before it."""

    conversations: int
    turns: int
    at_once: int
    message_words: int
    output_tokens: int
    seed: int = 1

    def message(self, conversation: int, turn: int) -> str:
        dice = random.Random(f"{self.seed}/{conversation}/{turn}")
        return " ".join(dice.choices(WORDS, k=self.message_words))


@dataclass
class Outcome:
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def converse(url: str, load: Load, killing: asyncio.Event | None = None) -> Outcome:
    """Runs all conversations; sets ``killing`` when a third of the answers is there."""
    found = Outcome()
    places = asyncio.Semaphore(load.at_once)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as llm:
        model = (await llm.models.list()).data[0].id

        async def conversation(number: int) -> None:
            async with places:
                messages = []
                for turn in range(load.turns):
                    messages.append({"role": "user", "content": load.message(number, turn)})
                    text = ""
                    try:
                        events = await llm.chat.completions.create(
                            model=model,
                            messages=messages,
                            max_tokens=load.output_tokens,
                            temperature=0,
                            stream=True,
                            stream_options={"include_usage": True},
                            extra_body={"ignore_eos": True},
                        )
                        reason = None
                        async for event in events:
                            for choice in event.choices:
                                text += choice.delta.content or ""
                                reason = choice.finish_reason or reason
                            found.tokens += event.usage.completion_tokens if event.usage else 0
                        if reason is None:
                            raise RuntimeError("the stream just ended")
                    except (openai.OpenAIError, RuntimeError) as error:
                        found.errors.append(f"conversation {number}, turn {turn}: {error!r}")
                        return
                    found.texts[number, turn] = text
                    messages.append({"role": "assistant", "content": text})
                    if killing is not None and len(found.texts) * 3 > load.conversations * load.turns:
                        killing.set()

        began = time.monotonic()
        await asyncio.gather(*(conversation(number) for number in range(load.conversations)))
        found.seconds = time.monotonic() - began
    return found


async def disturbed(running: Fleet, load: Load, disturb: Callable[[str], None] | None) -> Outcome:
    """The load, with ``disturb`` done to a worker in the middle."""
    now = asyncio.Event()

    async def wait() -> None:
        await now.wait()
        if disturb is not None:
            disturb("worker-0")

    waits = asyncio.create_task(wait())
    found = await converse(running.url, load, now)
    now.set()
    await waits
    return found


def migration(options: argparse.Namespace, folder: Path) -> bool:
    load = Load(options.conversations, turns=2, at_once=16, message_words=24, output_tokens=32)
    asked = load.conversations * load.turns
    print(
        f"one of two workers goes ({options.discovery}): {load.conversations} conversations, {asked} requests"
    )
    right: dict[tuple[int, int], str] = {}
    good = True
    for name in ("undisturbed", "SIGKILL", "its engine", "SIGTERM"):
        part = folder / name
        part.mkdir()
        with fleet(options.build_dir, "kv", options.discovery, part) as running:
            disturbs = {"SIGKILL": running.kill_worker, "SIGTERM": running.end_worker}
            disturbs["its engine"] = running.kill_engine
            found = asyncio.run(disturbed(running, load, disturbs.get(name)))
        right = right or found.texts
        changed = sum(right.get(key) != text for key, text in found.texts.items())
        print(
            f"  {name:<12} {len(found.texts)} answers, {len(found.errors)} lost, {changed} unlike the first round's, "
            f"{found.tokens_per_s:.0f} tokens/s",
            flush=True,
        )
        for line in found.errors[:3]:
            print(f"    {line}")
        good &= len(found.texts) == asked and not changed
    return good


def routing(options: argparse.Namespace, folder: Path) -> bool:
    load = Load(options.talks, turns=5, at_once=options.talks, message_words=160, output_tokens=16)
    rates = {}
    for mode in ("round-robin", "kv"):
        part = folder / mode
        part.mkdir()
        with fleet(options.build_dir, mode, options.discovery, part) as running:
            found = asyncio.run(converse(running.url, load))
        if found.errors:
            print(f"routing {mode}: {found.errors[0]}")
            return False
        rates[mode] = found.tokens_per_s
    gain = rates["kv"] / rates["round-robin"]
    print(
        f"routing: {load.conversations} conversations of {load.turns} turns, {load.message_words} words each"
    )
    print(
        f"  round robin {rates['round-robin']:.1f} tokens/s, by KV cache {rates['kv']:.1f}: {gain:.2f} times"
    )
    return gain >= LEAST_GAIN


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build-dir", default="build")
    parser.add_argument("--only", choices=("migration", "routing"))
    parser.add_argument("--discovery", choices=("etcd", "file"), default="etcd")
    parser.add_argument("--conversations", type=int, default=200, help="of the migration")
    parser.add_argument("--talks", type=int, default=16, help="conversations of the routing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    good = True
    with tempfile.TemporaryDirectory(prefix="flightline-dynamo-") as name:
        folder = Path(name)
        if options.only != "routing":
            good &= migration(options, folder)
        if options.only != "migration":
            good &= routing(options, folder)
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
