"""NVIDIA's own ``tritonclient`` and tensor names, nothing of ours: works against any of the three backends."""

import os
import queue

import numpy as np
import tritonclient.grpc as triton


def tensor(name: str, value: object, kind: str, dtype: object) -> triton.InferInput:
    """A [1, 1] input."""
    made = triton.InferInput(name, [1, 1], kind)
    made.set_data_from_numpy(np.array([[value]], dtype=dtype))
    return made


answers: queue.Queue = queue.Queue()
inputs = [
    tensor("text_input", b"The capital of France is", "BYTES", np.object_),
    tensor("max_tokens", 12, "INT32", np.int32),
    tensor("stream", True, "BOOL", np.bool_),
]
# Closed in any case: with one left open Python now and then hangs when it ends, in gRPC.
with triton.InferenceServerClient(f"127.0.0.1:{os.environ.get('GRPC_PORT', '8001')}") as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
    while True:
        result, error = answers.get(timeout=120)
        if error is not None:
            raise SystemExit(f"error: {error}")
        if (text := result.as_numpy("text_output")) is not None:
            print(text.reshape(-1)[0].decode(), end="", flush=True)
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
print()
