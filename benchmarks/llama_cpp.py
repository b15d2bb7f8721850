"""Our engine and llama.cpp on the same GGUF files, token by token.

    python3 benchmarks/llama_cpp.py FILE.gguf ... --peer PYTHON

PYTHON is an interpreter of a virtual environment of its own, which needs nothing but llama.cpp in a wheel:

    python3 -m venv llama && llama/bin/pip install xllamacpp

Both read the same token ids and answer greedily. Two of our sides are compared with llama.cpp and with each other:
``float32``, the file's codes times their scales without any other rounding, and ``int4``, the compiled kernels with
int8 activations, which a CPU serves with. llama.cpp rounds activations to 8 bits, too, and keeps keys and values in
float16. An answer counts as equal up to its first other token; there llama.cpp's own log-probabilities of the two say
whether it was a near tie. Then all sides score the tokens that llama.cpp wrote: how often each finds the same one
likeliest, and how far the log-probabilities of llama.cpp's ten likeliest tokens lie apart. One line of JSON a file and
side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.engine_build.engine_model import EngineModel  # noqa: E402
from flightline.engine_build.gguf_import import convert  # noqa: E402
from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import GenerationRequest  # noqa: E402
from flightline.torch_engine.engine import Engine  # noqa: E402
from flightline.torch_engine.kernels.cpu.toolchain import available_isas, compile_library  # noqa: E402

TEXTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):\n", "List three animals:", "Water boils at",
    "The opposite of hot is", "import numpy as np\n", "Ein Hund ist", "The three primary colours are",
    "In 1969, Neil Armstrong",
)  # fmt: skip
SIDES: dict[str, dict[str, str]] = {
    "float32": {"kernels": "pytorch", "compute_dtype": "float32"},
    "int4": {"kernels": "native", "weight_precision": "int4"},
}
TOP = 10
PEER = Path(__file__).with_name("peer_llama_cpp.py")
Answers = list[list[Any]]
"""For each prompt and token of its answer: the token, and its likeliest ones with their log-probabilities."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--peer", required=True, help="Python of the environment with xllamacpp")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        compile_library(Path(scratch), available_isas()[:1])
        for file in options.files:
            for result in both(file, Path(scratch), options):
                results.append(result)
                print(json.dumps(result), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def both(file: Path, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """llama.cpp's answers, and each of our sides against them; an engine is set up in ``folder``."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model").mkdir()
    convert(file, folder / "model", keep_codes=True)
    words = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    prompts = [words.encode(text).ids for text in TEXTS]
    peer = ask(options, file, prompts)
    exact: torch.Tensor | None = None
    for name, settings in SIDES.items():
        sizes = {"num_kv_blocks": 512, "max_seq_len": 512, "num_threads": options.threads}
        EngineConfig(model_dir="model", kernel_dir=".", **sizes, **settings).save(folder)
        result, values = compare(folder, prompts, peer["answers"])
        if exact is None:
            exact = values
        else:
            result["log_probabilities_apart_from_float32"] = spread(values - exact)
        yield {"file": file.name, "peer": f"xllamacpp {peer['version']}", "side": name} | result


def ask(options: argparse.Namespace, file: Path, prompts: list[list[int]]) -> dict[str, Any]:
    asked = {
        "model": str(file.resolve()), "prompts": prompts, "tokens": options.tokens, "threads": options.threads,
        "top": TOP,
    }  # fmt: skip
    run = subprocess.run(
        [options.peer, str(PEER)], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True
    )
    said: dict[str, Any] = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    return said


def compare(folder: Path, prompts: list[list[int]], peers: Answers) -> tuple[dict[str, Any], torch.Tensor]:
    """The engine in ``folder`` against the peer's answers, and its log-probabilities of the peer's likeliest tokens."""
    theirs = [[token for token, _ in answer] for answer in peers]
    engine = Engine(EngineConfig.load(folder))
    requests = [
        GenerationRequest(prompt, len(answer), end_id=-1)
        for prompt, answer in zip(prompts, theirs, strict=True)
    ]
    ours = [output.token_ids for output in engine.generate(requests)]
    model = EngineModel(folder, 512)
    equal, partings, agreed, values, expected = [], [], [], [], []
    for prompt, our, their, peer in zip(prompts, ours, theirs, peers, strict=True):
        ids = torch.tensor([prompt + their[:-1]])
        scored = model(ids, logits_to_keep=len(their)).logits[0].float().log_softmax(-1)
        agreed += (scored.argmax(-1) == torch.tensor(their)).tolist()
        for row, (_, likeliest) in zip(scored, peer, strict=True):
            tokens, known = zip(*likeliest, strict=True)
            values.append(row[list(tokens)])
            expected.append(torch.tensor(known))
        same = next((i for i, pair in enumerate(zip(our, their, strict=True)) if pair[0] != pair[1]), None)
        equal.append(len(their) if same is None else same)
        if same is not None:
            top = dict(peer[same][1])
            gap = top[their[same]] - top[our[same]] if our[same] in top else None
            partings.append(None if gap is None else round(gap, 4))
    whole = sum(count == len(their) for count, their in zip(equal, theirs, strict=True))
    scores = torch.cat(values)
    result = {
        "description": engine.info.description,
        "equal_answers": f"{whole} of {len(equal)}",
        "equal_tokens_before_the_first_other": equal,
        "llama_cpp_prefers_its_own_there_by": partings,
        "same_token_likeliest": round(sum(agreed) / len(agreed), 4),
        "tokens_scored": len(agreed),
        "log_probabilities_apart": spread(scores - torch.cat(expected)),
    }
    return result, scores


def spread(differences: torch.Tensor) -> dict[str, float]:
    distances = differences.abs()
    return {
        "mean": round(float(distances.mean()), 4),
        "median": round(float(distances.median()), 4),
        "99th percentile": round(float(distances.quantile(0.99)), 4),
    }


if __name__ == "__main__":
    main()
