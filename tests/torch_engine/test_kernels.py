"""Compiled kernels against the PyTorch ones in float32: odd shapes, ragged batches, blocks in random order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from torch_engine.config import ConfigError
from torch_engine.kernels.native import NativeKernels, NoCompiler, compile_library, compiler
from torch_engine.kernels.pytorch import PrefillChunk, PyTorchKernels, StepInput
from torch_engine.request import GenerationRequest

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler: the build takes the PyTorch kernels"
)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def native(library: str, request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(CPU, torch.float32, library, request.param)


@pytest.fixture
def reference() -> PyTorchKernels:
    return PyTorchKernels(CPU, torch.float32)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 7), (1, 96, 300), (3, 33, 65), (13, 576, 130), (70, 50, 1)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_linear(native, rows: int, inputs: int, outputs: int, biased: bool) -> None:
    weight = torch.randn(outputs, inputs).bfloat16().float()
    bias = torch.randn(outputs) if biased else None
    x = torch.randn(rows, inputs)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), bias.double() if biased else None
    ).float()
    close(native.linear(weight, bias)(x), expected)


@needs_compiler
def test_a_row_does_not_depend_on_its_neighbours(native) -> None:
    linear = native.linear(torch.randn(200, 96), None)
    x = torch.randn(40, 96)
    whole = linear(x)
    for rows in (1, 2, 5, 6, 7, 13, 40):
        assert torch.equal(linear(x[:rows].contiguous()), whole[:rows])


@needs_compiler
@pytest.mark.parametrize("size", [1, 16, 77, 576])
def test_norm_and_gate(native, reference, size: int) -> None:
    x, weight = torch.randn(5, size) * 3, torch.randn(size)
    close(native.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    heads = torch.randn(5, 4, size)[:, 1:3]
    close(native.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))
    gate_up = torch.randn(5, 2 * size) * 20
    for activation in ("silu", "gelu_tanh"):
        close(native.gate(gate_up.clone(), activation), reference.gate(gate_up.clone(), activation))


@needs_compiler
def test_rotate(native, reference) -> None:
    x = torch.randn(7, 6, 20)
    table, positions = torch.randn(50, 2, 10), torch.randint(0, 50, (7,))
    expected = reference.rotate(x[:, :4], table, positions)
    whole = x.clone()
    close(native.rotate(whole[:, :4], table, positions), expected)
    assert torch.equal(whole[:, 4:], x[:, 4:]), "nothing beside the heads is touched"


@needs_compiler
def test_argmax_takes_the_first_of_equals(native) -> None:
    logits = torch.randn(9, 5001)
    logits[3, 70] = logits[3, 4000] = 99.0
    assert native.argmax(logits).tolist() == logits.argmax(-1).tolist()
    assert native.argmax(logits)[3] == 70


def ragged_step(chance: random.Random, block_size: int, num_blocks: int) -> StepInput:
    """Decodes and prompt chunks of random lengths whose blocks lie in random order."""
    free = chance.sample(range(num_blocks), num_blocks)
    contexts = [chance.randrange(1, 40) for _ in range(5)]
    counts = [1, 1, 1, chance.randrange(2, contexts[3] + 2), chance.randrange(2, contexts[4] + 2)]
    slots, tables, prefills, start = [], [], [], 0
    for context, count in zip(contexts, counts, strict=True):
        context = max(context, count)
        blocks = [free.pop() for _ in range(-(-context // block_size))]
        tables.append((blocks, context))
        for position in range(context - count, context):
            slots.append(blocks[position // block_size] * block_size + position % block_size)
        if count > 1:
            prefills.append(PrefillChunk(start, start + count, context, torch.tensor(blocks)))
        start += count
    decodes = tables[:3]
    width = max(len(blocks) for blocks, _ in decodes)
    return StepInput(
        token_ids=torch.zeros(start, dtype=torch.int64),
        positions=torch.zeros(start, dtype=torch.int64),
        slots=torch.tensor(slots),
        decode_blocks=torch.tensor([blocks + [0] * (width - len(blocks)) for blocks, _ in decodes]),
        decode_lengths=torch.tensor([context for _, context in decodes]),
        prefills=prefills,
        logit_rows=torch.tensor([0]),
    )


@needs_compiler
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(1, 1, 8), (3, 3, 64), (2, 4, 40), (2, 1, 128)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (17, 3.0)])
def test_attention(native, reference, kv_heads: int, group: int, size: int, window, softcap) -> None:
    chance = random.Random(kv_heads * 100 + size)
    torch.manual_seed(size)
    for block_size in (1, 4, 16):
        step = ragged_step(chance, block_size, 400)
        tokens = step.slots.shape[0]
        qkv = torch.randn(tokens, kv_heads * (group + 2), size)
        q, k, v = qkv.split([kv_heads * group, kv_heads, kv_heads], dim=1)
        cache = torch.randn(400, block_size, 2, kv_heads, size)
        ours, theirs = cache.clone(), cache.clone()
        result = native.attend(q, k, v, ours, step, 0.3, window, softcap)
        close(result, reference.attend(q, k, v, theirs, step, 0.3, window, softcap), 5e-5)
        assert torch.equal(ours, theirs)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_do_not_depend_on_threads_or_neighbours(make_engine, library: str, threads: int) -> None:
    chance = random.Random(8)
    requests = [
        GenerationRequest([chance.randrange(3, 250) for _ in range(chance.randrange(1, 40))], 24, end_id=-1)
        for _ in range(9)
    ]
    settings = {"kernel_library": library, "max_num_tokens": 64, "num_kv_blocks": 512, "max_batch_size": 32}
    engine = make_engine(num_threads=threads, **settings)
    assert engine.kernels.name == "native"
    together = [output.token_ids for output in engine.generate(requests)]
    alone = [make_engine(num_threads=1, **settings).generate([request])[0].token_ids for request in requests]
    plain = [output.token_ids for output in make_engine(kernels="pytorch").generate(requests)]
    assert together == alone == plain


@needs_compiler
def test_a_compiler_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoCompiler, match="failed"):
        compile_library(tmp_path, ("-not-a-flag",))
    assert not list(tmp_path.iterdir()), "nothing half-written"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="no C\\+\\+ compiler"):
        compile_library(tmp_path)


def test_a_library_that_cannot_run_is_refused_with_the_remedy(make_engine, tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match="make build-engines"):
        make_engine(kernel_library=str(broken))
    with pytest.raises(ConfigError, match="make build-engines"):
        make_engine(kernels="native")
    with pytest.raises(ConfigError, match="kernels='fast'"):
        make_engine(kernels="fast")
