"""The random models of the GPU benchmarks, scaled down: what only a GPU would show is not tried there first."""

from __future__ import annotations

import pytest

from benchmarks.random_checkpoint import PRECISIONS, SHAPES, RandomCheckpoint, scaled_down
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.model.layout import count
from flightline.torch_engine.text.stream import TokenBytes


@pytest.mark.parametrize(
    ("shape", "precision"), [(shape, form) for shape, forms in PRECISIONS.items() for form in forms]
)
def test_answers(shape: str, precision: str) -> None:
    spec = scaled_down(SHAPES[shape])
    checkpoint = RandomCheckpoint(spec, precision, device="cpu")
    stored = checkpoint.coded("model.layers.0.self_attn.q_proj")
    assert (stored is None) == (precision in ("bf16", "int8", "mxfp4"))
    config = EngineConfig(model_dir="random", num_kv_blocks=16, max_seq_len=64, num_threads=1)
    engine = Engine(config, checkpoint, TokenBytes([b"a"] * spec.vocab_size))
    (answer,) = engine.generate([GenerationRequest([5, 6, 7], 3, end_id=-1)])
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-8b", 8.03e9), ("llama-70b", 70.6e9), ("qwen3-30b-a3b", 30.5e9), ("gpt-oss-20b", 20.9e9)],
)
def test_the_shapes_are_the_models(shape: str, parameters: float) -> None:
    assert count(SHAPES[shape])[0] == pytest.approx(parameters, rel=0.005)
