"""The OpenAI endpoint on one GPU, beside vLLM's, both under vLLM's own client: ``python3 benchmarks/gpu_gateway.py``.

    python3 -u benchmarks/gpu_gateway.py --folder /tmp/served --site /tmp/site --out FILE

Writes the random FP8 checkpoint of ``gpu_served.py`` (the shape of Llama-3.1-8B, or ``--shape 70b``) and builds from
it, unless the folder has them; puts the load on the engine alone; starts our server as ``make serve`` does and loads it
with our own client of several processes, over gRPC and through the gateway, then through the gateway with vLLM's
(``peer_load.py``), which is one process; stops it; starts vLLM's server on the same shape (FP8 weights and KV cache,
prefix cache off, random weights) and loads it with vLLM's client, too. 128/128 tokens, streaming, 1, 32, 64 and 256 in
flight, temperature 0 and 1. Prints a line of JSON a case, then a table of all with their ratios. ``--parts`` takes
``build``, ``engine``, ``grpc``, ``http`` (our client through the gateway), ``ours`` and ``peer`` one by one; ``--out``
keeps what other parts have found. On an H200 the parts engine, grpc, ours and peer took 8.6 minutes with a new cache of
kernels and vLLM's client run once; now each part runs as often as ``--repeats`` says.

``--site`` is a folder with vLLM and what it needs, in its own versions, numpy 2 among them; only the peer and its
client see it. Ours needs these wheels (Python 3.12) in the interpreter's own folder, since Triton's stub reads no
PYTHONPATH, beside the machine's PyTorch 2.11, Triton 3.6, transformers, tokenizers, safetensors, grpcio, aiohttp,
jinja2, click, h11, psutil and nvidia-ml-py: nvidia-pytriton==0.7.0 numpy==1.26.4 tritonclient==2.73.0
python-rapidjson==1.25 protobuf==6.33.6 uvicorn==0.54.0 httptools==0.9.0 uvloop==0.23.0 orjson==3.13.0 h2==4.4.1
hpack==4.2.0 hyperframe==6.1.0 llguidance==1.9.1 prometheus_client==0.26.0 gguf==0.19.0.

``--shape tiny`` tries it without a GPU and without vLLM: a tiny shape, our gRPC client alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# Not where it is used: client processes import this file at their start, and must not import that at their first load.
from gpu_served import SHAPES, WARM_UP, WAVES, Clients, Prompts, engine_alone  # noqa: E402

PARTS = ("build", "engine", "grpc", "http", "ours", "peer")
KIND_OF = {"0": "greedy", "1": "temp1"}
"""Temperature -> kind of ``kinds.py``."""
START_S = 300.0
PEER_PORT = 8009


def say(line: dict[str, Any]) -> dict[str, Any]:
    print(
        json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in line.items()}), flush=True
    )
    return line


def model_folder(options: argparse.Namespace) -> Path:
    """The checkpoint that ``gpu_served.py`` writes."""
    return Path(options.folder / SHAPES[options.shape][0])


def build(options: argparse.Namespace) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_served.py"), "--folder", str(options.folder)]
    command += ["--shape", options.shape, "--tp", str(options.tp), "--build-only"]
    subprocess.run(command, cwd=ROOT, check=True)


@contextmanager
def running(command: list[str], url: str, log: Path, env: dict[str, str]) -> Iterator[None]:
    """A server, from its first 200 at ``url`` to its end."""
    began = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file) as server,
    ):
        try:
            while not answers(url):
                if server.poll() is not None or time.monotonic() - began > START_S:
                    raise SystemExit(f"{command[2]} did not start: {log.read_text()[-3000:]}")
                time.sleep(0.25)
            print(f"{command[2]}: ready after {time.monotonic() - began:.0f} s", flush=True)
            yield
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(options: argparse.Namespace, side: str, url: str, model: str) -> list[dict[str, Any]]:
    """vLLM's client in its own environment."""
    command = [sys.executable, str(ROOT / "benchmarks/peer_load.py"), "--url", url, "--model", model]
    command += ["--tokenizer", str(model_folder(options)), "--levels", options.levels]
    command += ["--temperatures", options.temperatures, "--repeats", str(options.repeats)]
    with subprocess.Popen(command, env=peers(options), stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        found = [say({"side": side} | json.loads(line)) for line in client.stdout if line.startswith("{")]
    if client.returncode:
        raise SystemExit(f"the client of {side} ended with status {client.returncode}")
    return medians(found)


def medians(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a case, of those of all its repeats."""
    cases: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for line in found:
        cases.setdefault((line["level"], line["temperature"]), []).append(line)
    made = []
    for same in cases.values():
        line = same[0] | {"rates": [each["output_throughput"] for each in same]}
        for name in same[0].keys() - {"side", "level", "temperature"}:
            line[name] = statistics.median(each[name] for each in same)
        made.append(line)
    return made


def processor_seconds() -> dict[str, float]:
    """What each kind of process of our server has used so far."""
    names = {
        "flightline.supervisor": "supervisor",
        "flightline.gateway": "gateway",
        "triton_python_backend_stub": "stubs",
        "tritonserver": "Triton",
        "torch_engine": "engine",
    }
    used = dict.fromkeys(names.values(), 0.0)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline()[:4])
            if name := next((name for part, name in names.items() if part in command), ""):
                used[name] += sum(process.cpu_times()[:2])
    return used


def peers(options: argparse.Namespace) -> dict[str, str]:
    """The environment of what is vLLM's."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return os.environ | own | {"PYTHONPATH": str(options.site)}


def ours(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our server under both clients."""
    http, grpc = os.environ.get("HTTP_PORT") or "8000", os.environ.get("GRPC_PORT") or "8001"
    serve = [
        sys.executable,
        "-m",
        "flightline.supervisor.serve",
        "--build-dir",
        str(options.folder / "build"),
    ]
    quiet = os.environ | {"PROBE_PERIOD_S": "3600"}
    url, found = f"http://127.0.0.1:{http}", []
    with running([*serve, "--no-baseline"], f"{url}/ready", options.folder / "ours.log", quiet):
        if "grpc" in options.parts:
            found += by_our_client(options, "ours over gRPC", f"127.0.0.1:{grpc}", "text_generation")
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        if "http" in options.parts:
            found += by_our_client(options, "ours, our client", url, name)
        if "ours" in options.parts:
            before, began = processor_seconds(), time.monotonic()
            found += load(options, "ours", url, name)
            took = time.monotonic() - began
            used = {kind: seconds - before[kind] for kind, seconds in processor_seconds().items()}
            say({"part": "processor seconds, with the client's start", "seconds": took} | used)
    return found


def engine(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the server starts, without it, under the same closed loop."""
    asked = ["--shape", options.shape, "--concurrency", options.levels]
    asked += ["--sampling", ",".join(KIND_OF[temperature] for temperature in options.temperatures.split(","))]
    rates: dict[tuple[float, int], list[float]] = {}
    for line in engine_alone(options.folder / "build", [*asked, "--repeats", str(options.repeats)]):
        temperature = next(value for value, kind in KIND_OF.items() if kind == line["sampling"])
        rates.setdefault((float(temperature), line["users"]), []).append(line["tok_s"])
    return [
        say(
            {"side": "engine", "level": level, "temperature": temperature, "rates": found}
            | {"output_throughput": statistics.median(found)}
        )
        for (temperature, level), found in rates.items()
    ]


def by_our_client(options: argparse.Namespace, side: str, url: str, model: str) -> list[dict[str, Any]]:
    """Streaming, in as many processes whatever the endpoint; it also warms the engine up."""
    prompts, clients = Prompts(SHAPES[options.shape][1], side), Clients(url, options.clients)
    levels = [int(level) for level in options.levels.split(",")]
    for count in sorted({*WARM_UP, *levels}):
        clients.load(model, prompts(count), count, True)
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for temperature in options.temperatures.split(","):
            for level in levels:
                kind = KIND_OF[temperature]
                case = clients.load(model, prompts(max(4, WAVES * level)), level, True, kind)
                cases.setdefault((temperature, level), []).append(case)
    found = []
    for (temperature, level), same in cases.items():
        line = {"side": side, "level": level, "temperature": float(temperature)}
        line["rates"] = [case["tok_s"] for case in same]
        line["output_throughput"] = statistics.median(line["rates"])
        for name in ("ttft_ms", "tpot_ms"):
            line[f"mean_{name}"] = statistics.median(case[name] for case in same)
        found.append(say(line))
    return found


def peer(options: argparse.Namespace) -> list[dict[str, Any]]:
    """vLLM's server."""
    from peer_vllm import SHAPES as PEERS_SHAPES
    from peer_vllm import UNFUSED, WITHOUT_MULTICAST

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in model_folder(options).glob("tokenizer*.json"):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(PEERS_SHAPES[f"llama-{options.shape}"]))
        serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", scratch]
        serve += ["--load-format", "dummy", "--quantization", "fp8", "--kv-cache-dtype", "fp8"]
        serve += ["--max-model-len", "4096", "--max-num-seqs", "512", "--gpu-memory-utilization", "0.85"]
        serve += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(PEER_PORT)]
        env = peers(options)
        if options.tp > 1:
            serve += ["--tensor-parallel-size", str(options.tp), "--compilation-config", json.dumps(UNFUSED)]
            env |= WITHOUT_MULTICAST
        url = f"http://127.0.0.1:{PEER_PORT}"
        with running(serve, f"{url}/health", options.folder / "peer.log", env):
            return load(options, "vLLM", url, scratch)


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown; ratios of ours to the others in brackets."""
    yield "| temperature, in flight | | tok/s | TTFT ms, mean / p99 | TPOT ms, mean / p99 |"
    yield "|---|---|--:|--:|--:|"
    cases = dict.fromkeys((line["temperature"], line["level"]) for line in found)
    for temperature, level in cases:
        same = {
            line["side"]: line
            for line in found
            if (line["temperature"], line["level"]) == (temperature, level)
        }
        own = same.get("ours", {}).get("output_throughput")
        for side, line in same.items():
            rate = line["output_throughput"]
            ratio = f" (ours: {own / rate:.2f})" if own and side != "ours" else ""
            times = (
                " / ".join(f"{line.get(f'{which}_{name}_ms', float('nan')):.2f}" for which in ("mean", "p99"))
                for name in ("ttft", "tpot")
            )
            yield f"| {temperature:g}, {level} | {side} | {rate:,.0f}{ratio} | {' | '.join(times)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="for checkpoint and build; logs go there, too"
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="GPUs that share each layer of our engine, and of vLLM's"
    )
    parser.add_argument("--site", type=Path, help="folder with vLLM")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)} (all; of a tiny shape build,engine,grpc,http)")
    parser.add_argument("--levels", default="1,32,64,256")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--clients", type=int, default=4, help="most processes of our own client")
    parser.add_argument("--repeats", type=int, default=2, help="of each part but the build")
    parser.add_argument("--out", type=Path, help="results as JSON; those of other parts stay")
    parser.add_argument(
        "--shape", default="8b", choices=SHAPES, help="of the model; tiny: on the CPU, without vLLM"
    )
    options = parser.parse_args()
    options.parts = (
        options.parts.split(",") if options.parts else PARTS[: 4 if options.shape == "tiny" else None]
    )
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(unknown)}: it must be of {', '.join(PARTS)}")
    if not options.site and {"ours", "peer"} & set(options.parts):
        parser.error("--site is missing: give the folder with vLLM, whose client puts the load on")
    options.folder.mkdir(parents=True, exist_ok=True)
    if "build" in options.parts:
        build(options)
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    served = {"grpc": "ours over gRPC", "http": "ours, our client", "ours": "ours"}
    loaded = tuple(side for part, side in served.items() if part in options.parts)
    every = (({"engine"}, ("engine",), engine), (set(served), loaded, ours))
    for parts, sides, part in (*every, ({"peer"}, ("vLLM",), peer)):
        if parts & set(options.parts):
            found = [line for line in found if line["side"] not in sides] + part(options)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1))
    print("\n".join(table(found)), flush=True)


if __name__ == "__main__":
    main()
