"""A model's size from its configuration alone, before a single weight has been read or fetched."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flightline.engine_build.checkpoint import (
    EMBEDDED_MODEL,
    check_small_files,
    is_gguf,
    require_hub_id,
    slug,
)
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hub import fetch_configuration
from flightline.engine_build.plan import ModelShape
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.shard import refusal
from flightline.torch_engine.model.spec import ModelSpec

HUB_PATIENCE_S = 2.5
MOST_GPUS = 16
"""That share a model."""
EMBEDDED_SHAPE = ModelShape(
    layers=30,
    kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    parameters=134_515_008,
    linear_parameters=106_168_320,
    family="LlamaForCausalLM",
    splits=(3,),
)
"""So that preflight needs no package at all."""


@dataclass(frozen=True)
class Model:
    """What is asked for."""

    name: str
    shape: ModelShape
    fetch_bytes: int
    """Still to be downloaded; an estimate."""


def look_up(model: str) -> Model:
    """The model behind ``MODEL``: embedded, a local folder, or a hub id (asked for a few seconds at most).

    Raises:
        BuildError: it does not exist, is gated, cannot be reached, or is of an unsupported kind.
    """
    if model in ("", EMBEDDED_MODEL):
        return Model(EMBEDDED_MODEL, EMBEDDED_SHAPE, 0)
    path = Path(model).expanduser()
    if path.is_dir():
        check_small_files(path)
        return Model(slug(path.resolve().name), of_spec(load_spec(path)), 0)
    if is_gguf(path):
        return Model(slug(path.stem), of_spec(_gguf_spec(path)), 0)
    require_hub_id(model)
    folder = _from_hub(model)
    shape = of_spec(load_spec(folder))
    fetched = any(folder.glob("model*.safetensors"))
    return Model(slug(model), shape, 0 if fetched else (1 if shape.fp8 else 2) * shape.parameters)


def _gguf_spec(path: Path) -> ModelSpec:
    """Of the file's header."""
    if importlib.util.find_spec("gguf") is None:
        raise BuildError(f"MODEL={path} cannot be looked up yet: run 'make setup'")
    from flightline.engine_build.gguf_import import write_configuration

    with tempfile.TemporaryDirectory() as folder:
        write_configuration(path, Path(folder))
        try:
            return load_spec(folder)
        except UnsupportedModel as error:
            raise BuildError(f"MODEL={path}: {error}") from None


def _from_hub(model: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BuildError(f"MODEL={model} cannot be looked up yet: run 'make setup', or give a local folder")
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        return pool.submit(fetch_configuration, model, check_small_files).result(timeout=HUB_PATIENCE_S)
    except concurrent.futures.TimeoutError:
        raise BuildError(
            f"MODEL={model}: the hub did not answer within {HUB_PATIENCE_S} s, so nothing is known about it: "
            "try again, or give a local folder"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def of_spec(spec: ModelSpec) -> ModelShape:
    """Counts of a decoder, all experts included; small parts (QK norms, biases, routers) are left out."""
    hidden, layers = spec.hidden_size, spec.num_layers
    attention = 2 * hidden * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    inner = sum(
        layer.mixture.experts * layer.mixture.inner + layer.mixture.shared_inner
        if layer.mixture
        else spec.intermediate_size
        for layer in spec.layers
    )
    mixtures = [layer.mixture for layer in spec.layers if layer.mixture]
    unchosen = sum((mixture.experts - mixture.chosen) * mixture.inner for mixture in mixtures)
    linear = layers * attention + 3 * hidden * inner
    norms = hidden * (1 + layers * len(spec.norms.modules))
    embeddings = spec.vocab_size * hidden * (1 if spec.tie_embeddings else 2)
    return ModelShape(
        layers=layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        parameters=linear + norms + embeddings,
        linear_parameters=linear,
        idle_parameters=0 if spec.tie_embeddings else spec.vocab_size * hidden,
        idle_linear_parameters=3 * hidden * unchosen,
        family=spec.wrapper or spec.architecture,
        fp8=spec.fp8,
        int4=spec.int4,
        stored=spec.stored,
        windows=spec.windows,
        splits=tuple(number for number in range(2, MOST_GPUS + 1) if not refusal(spec, number)),
    )
