"""What a count beside each piece of text costs: CPU of a streamed response in the stub and in Triton.

``python3 benchmarks/streamed_outputs.py BUILD_DIR [--streams 32] [--tokens 400] [--rounds 5]``

BUILD_DIR is a build of backend torch (``make build-engines``), best of a small model. ``text_generation`` streams
``--streams`` answers at a time: in turns with ``num_output_tokens`` in every response, with it in the last one, and
without. Told is what the system charged the processes, by responses, whatever the load of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import psutil
from tritonclient.grpc import service_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stub_batching import free_ports
from flightline.client import wire
from flightline.client.params import GenerateParams
from flightline.supervisor.serve import Server, ServeSettings

KINDS: dict[str, dict[str, Any]] = {
    "in each": {"return_num_output_tokens": True},
    "in the last": {"return_num_output_tokens": True, "counts_at_end": True},
    "nowhere": {"return_num_output_tokens": False},
}


def processes() -> dict[str, psutil.Process]:
    """The stub of ``text_generation``, and Triton."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline())
        if "python_backend_stub" in line and "/text_generation/" in line:
            found["stub"] = process
        elif Path(process.cmdline()[0]).name == "tritonserver":
            found["triton"] = process
    return found


def cpu_of_a_response(url: str, kind: str, streams: int, tokens: int) -> dict[str, float]:
    """CPU-us of each process; and responses in all."""
    params = GenerateParams(
        max_tokens=tokens, ignore_eos=True, return_num_input_tokens=False, return_perf_metrics=False,
        return_finish_reason=True, **KINDS[kind],
    )  # fmt: skip
    counts = [0] * streams
    watched = processes()

    def ask(number: int) -> None:
        with grpc.insecure_channel(url) as channel:
            call = channel.unary_stream(
                wire.STREAM_INFER,
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )
            request = wire.infer_request("text_generation", "", f"the dog {number}", params, stream=True)
            for message in call(request):
                assert not message.error_message, message.error_message
                counts[number] += 1

    def spent() -> dict[str, float]:
        return {name: sum(each.cpu_times()[:2]) for name, each in watched.items()}

    before = spent()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = spent()
    assert min(counts) > tokens // 4, "a client has failed"
    return {name: (after[name] - before[name]) / sum(counts) * 1e6 for name in watched} | {
        "responses": float(sum(counts))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    http, port, metrics = free_ports(3)
    settings = ServeSettings(
        options.build_dir, http_port=http, grpc_port=port, metrics_port=metrics, baseline=False
    )
    told: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with Server(settings):
        for number in range(options.rounds + 1):
            for kind in KINDS:
                found = cpu_of_a_response(settings.grpc_url, kind, options.streams, options.tokens)
                if number:  # the first warms up
                    told[kind].append(found)
    for kind, rounds in told.items():
        shown = {name: round(statistics.median(each[name] for each in rounds), 1) for name in rounds[0]}
        print(f"{kind:12} CPU-us a response {shown}")


if __name__ == "__main__":
    main()
