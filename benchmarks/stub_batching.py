"""What Triton's dynamic batching of our Python stubs would be worth: short requests with and without it, in turns.

``python3 benchmarks/stub_batching.py BUILD_DIR [--seconds 5] [--rounds 3] [--in-flight 16]``

BUILD_DIR is a build (``make build-engines``). Each turn serves a copy of its model repository in which
``text_generation`` and ``preprocessing`` have, or have not, a ``dynamic_batching`` block, and counts the requests for
one token that end in a second. Prints requests/s of each turn and the ratio of the medians. The difference is the most
that batching can give: requests for more tokens spend their time elsewhere. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient

sys.path.insert(0, str(Path(__file__).resolve().parent))

from under_test import free_ports

from flightline.supervisor.serve import Server, ServeSettings

MODELS = ("preprocessing", "text_generation")
ENDPOINTS = ("ensemble", "text_generation")
BLOCK = "\ndynamic_batching {}\n"


def copy_of(build: Path, folder: Path, batching: bool) -> Path:
    """A build folder with the same engine and a model repository of its own."""
    deployment = json.loads((build / "deployment.json").read_text(encoding="utf-8"))
    repository = folder / "model_repository"
    shutil.copytree(deployment["model_repository"], repository)
    for model in MODELS:
        config = repository / model / "config.pbtxt"
        config.write_text(config.read_text(encoding="utf-8") + BLOCK * batching, encoding="utf-8")
    deployment["model_repository"] = str(repository)
    (folder / "deployment.json").write_text(json.dumps(deployment), encoding="utf-8")
    return folder


def requests_per_second(url: str, endpoint: str, in_flight: int, seconds: float) -> float:
    """Of a closed loop of requests for one token; every request must end well."""
    ended, deadline = [], time.monotonic() + seconds

    def ask() -> None:
        count, answered = 0, threading.Semaphore(0)
        errors: list[Exception] = []

        def note(result: object, error: Exception | None) -> None:
            if error is not None:
                errors.append(error)
            answered.release()

        with grpcclient.InferenceServerClient(url) as client:
            client.start_stream(note)
            inputs = [
                grpcclient.InferInput("text_input", [1, 1], "BYTES"),
                grpcclient.InferInput("max_tokens", [1, 1], "INT32"),
            ]
            inputs[0].set_data_from_numpy(np.array([[b"the dog"]], np.object_))
            inputs[1].set_data_from_numpy(np.array([[1]], np.int32))
            while time.monotonic() < deadline:
                client.async_stream_infer(endpoint, inputs)
                answered.acquire()
                count += 1
            client.stop_stream()
        assert not errors, errors[0]
        ended.append(count)

    threads = [threading.Thread(target=ask) for _ in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == in_flight, "a client has failed"
    return sum(ended) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=16)
    options = parser.parse_args()
    rates: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for batching in (False, True):
            with tempfile.TemporaryDirectory(prefix="flightline-") as folder:
                build = copy_of(options.build_dir, Path(folder), batching)
                http, grpc, metrics = free_ports(3)
                settings = ServeSettings(
                    build, http_port=http, grpc_port=grpc, metrics_port=metrics, baseline=False
                )
                with Server(settings):
                    for endpoint in ENDPOINTS:
                        requests_per_second(settings.grpc_url, endpoint, options.in_flight, 1.0)
                        rate = requests_per_second(
                            settings.grpc_url, endpoint, options.in_flight, options.seconds
                        )
                        rates.setdefault((endpoint, batching), []).append(rate)
    print(f"requests/s for one token, {options.in_flight} in flight")
    for endpoint in ENDPOINTS:
        plain, batched = rates[endpoint, False], rates[endpoint, True]
        ratio = statistics.median(batched) / statistics.median(plain)
        shown = [" ".join(f"{rate:.0f}" for rate in each) for each in (plain, batched)]
        print(f"{endpoint:16} without {shown[0]:24} with {shown[1]:24} with/without {ratio:.2f}")


if __name__ == "__main__":
    main()
