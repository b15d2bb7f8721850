"""Compiled kernels against float references: odd shapes, group tails, ragged batches, blocks in random order.

``test_sanitizers`` runs all of this once more under AddressSanitizer and UBSan, with vectors of another width.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.core.steps import PrefillChunk, StepInput
from flightline.torch_engine.kernels.cpu import native as native_module
from flightline.torch_engine.kernels.cpu.native import GROUP, NativeKernels, NativeLinear
from flightline.torch_engine.kernels.cpu.toolchain import (
    ISAS,
    NoCompiler,
    available_isas,
    compile_library,
    compiler,
)
from flightline.torch_engine.kernels.operations import Operations
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.coded import Coded
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")
FLOATS, INTEGERS = SimpleNamespace(integers=0), SimpleNamespace(integers=1)
needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler: the build takes the PyTorch kernels"
)
Make = Callable[..., NativeKernels]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(4)


@pytest.fixture
def make(library: str) -> Make:
    def kernels(threads: int = 2, **settings: str) -> NativeKernels:
        config = EngineConfig(model_dir="none", kernel_dir=library, **settings)
        return NativeKernels(config, CPU, torch.float32, threads)

    return kernels


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def native(make: Make, request: pytest.FixtureRequest) -> NativeKernels:
    return make(request.param)


@pytest.fixture
def reference() -> PyTorchKernels:
    return PyTorchKernels(CPU, torch.float32)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def pack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of ``x [T, K]`` as the kernels write them (int_linear.h), and the float64 values they stand for."""
    rows, size = x.shape
    padded = torch.nn.functional.pad(x, (0, -size % GROUP)).view(rows, -1, GROUP)
    scales = padded.abs().amax(-1) / 127
    codes = (padded / scales.clamp(min=1e-30)[..., None]).round().clamp(-127, 127)
    words = b"".join(
        struct.pack("2f", scale, scale * row.sum()) + bytes(row.to(torch.int8).view(torch.uint8).tolist())
        for scale, row in zip(scales.flatten().tolist(), codes.view(-1, GROUP), strict=True)
    )
    groups = torch.frombuffer(bytearray(words), dtype=torch.uint8).view(rows, -1)
    return groups, (codes.double() * scales.double()[..., None]).view(rows, -1)[:, :size]


def unpack(groups: torch.Tensor, size: int) -> torch.Tensor:
    parts = groups.view(groups.shape[0], -1, 8 + GROUP)
    scales = parts[..., :4].contiguous().view(torch.float32)
    codes = parts[..., 8:].contiguous().view(torch.int8).float()
    sums = parts[..., 4:8].contiguous().view(torch.float32)
    assert torch.allclose(sums[..., 0], codes.sum(-1) * scales[..., 0], rtol=1e-6)
    return (codes * scales).flatten(1)[:, :size]


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The float64 weights that int8 (symmetric) and shorter codes (with a minimum) stand for (int_linear.h)."""
    size = weight.shape[1]
    parts = weight.split(GROUP, dim=1)
    lows = torch.stack([part.amin(1) for part in parts], dim=1)
    if bits == 8:
        steps = torch.stack([part.abs().amax(1) for part in parts], dim=1) / 127
        unit = steps.amax(1, keepdim=True) / 32767
        low = torch.zeros_like(lows)
    else:
        top = 2**bits - 1
        steps = (torch.stack([part.amax(1) for part in parts], dim=1) - lows) / top
        unit = steps.amax(1, keepdim=True) / min(32767, (2**31 - 1) // (GROUP * 127 * top))
        low = torch.where(unit > 0, lows / unit, 0.0).bfloat16().float() * unit
    scales = torch.where(unit > 0, steps / unit, 0.0).round() * unit
    scales, low = (each.repeat_interleave(GROUP, dim=1)[:, :size] for each in (scales, low))
    limits = (-127, 127) if bits == 8 else (0, 2**bits - 1)
    codes = torch.where(scales > 0, (weight - low) / scales, 0.0).round().clamp(*limits)
    return codes.double() * scales.double() + low.double()


def integer_linear(
    kernels: NativeKernels, weight: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> NativeLinear:
    """As a layer or the output head has it: 7 bits are the head's beside int4 layers."""
    if bits == 7:
        return kernels.linear(weight, bias)
    checkpoint = SimpleNamespace(
        fused=lambda modules, dtype: (weight, bias), fused_coded=lambda modules, dtype, device: None
    )
    return kernels.load_linear(checkpoint, ["mlp.up_proj"])


PRECISIONS = {8: "int8", 7: "int4", 4: "int4"}
SHAPES = [(1, 64, 7), (1, 96, 300), (3, 33, 65), (13, 576, 130), (70, 50, 1)]


@needs_compiler
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
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
@pytest.mark.parametrize("isa", ["auto", "portable"])
@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_integer_linear(make: Make, isa: str, bits: int, rows: int, inputs: int, outputs: int) -> None:
    kernels = make(cpu_isa=isa, weight_precision=PRECISIONS[bits])
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    weight[:, ::7] *= 20
    groups, x = pack(torch.randn(rows, inputs) * torch.rand(rows, inputs).pow(4) * 50)
    linear = integer_linear(kernels, weight, bias, bits)
    assert linear.bits == bits
    close(linear(groups).double(), x @ rounded(weight, bits).T + bias.double(), 1e-5)


@needs_compiler
@pytest.mark.parametrize("isa", ["auto", "portable"])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 160), (5, 32)])
def test_codes_of_a_checkpoint(make: Make, isa: str, bits: int, group: int) -> None:
    """They stay; scales of both signs lose 2^-16 of the largest of their column, minima what bfloat16 loses."""
    kernels = make(cpu_isa=isa, weight_precision="int4")
    codes = torch.randint(0, 2**bits, (33, 160), dtype=torch.uint8)
    scales, minima = torch.randn(2, 33, -(-160 // group)).unbind()
    coded = Coded(codes, scales, group, minima, bits)
    stored = SimpleNamespace(fused_coded=lambda modules, dtype, device: (coded, torch.ones(33)))
    linear = kernels.load_linear(stored, ["mlp.up_proj"])
    assert linear.bits == (4 if bits == 4 else 7)
    groups, x = pack(torch.randn(3, 160))
    close(linear(groups).double(), x @ coded.values(torch.float64).T + 1, 3e-3)


@needs_compiler
@pytest.mark.parametrize("isa", ["auto", "portable"])
@pytest.mark.parametrize("bits", PRECISIONS)
def test_integer_sums_do_not_overflow(make: Make, isa: str, bits: int) -> None:
    """The largest codes of both signs, in every combination that a pair of products can have."""
    kernels = make(cpu_isa=isa, weight_precision=PRECISIONS[bits])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    weight, x = signs.repeat(6, 32), signs.repeat(3, 32)
    weight[:, 31::32] = 1 - 2 * (torch.arange(18)[:, None] % 2)  # short codes need a range
    groups, values = pack(x)
    linear = integer_linear(kernels, weight, None, bits)
    close(linear(groups).double(), values @ rounded(weight, bits).T, 1e-5)


@needs_compiler
@pytest.mark.parametrize("bits", [16, *PRECISIONS])
def test_a_row_does_not_depend_on_its_neighbours(make: Make, bits: int) -> None:
    kernels = make(weight_precision=PRECISIONS.get(bits, "auto"))
    linear = integer_linear(kernels, torch.randn(200, 96), None, bits)
    x = torch.randn(70, 96)
    x = pack(x)[0] if linear.integers else x
    whole = linear(x)
    for rows in (1, 2, 5, 6, 7, 13, 40, 49):
        assert torch.equal(linear(x[:rows].contiguous()), whole[:rows])


@needs_compiler
@pytest.mark.parametrize("bits", [4, 7, 8, 16])
def test_a_weight_is_packed_in_pieces(make: Make, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    kernels, weight = make(), torch.randn(203, 70).bfloat16()
    packed = []
    for at_once in (1 << 12, 64):
        monkeypatch.setattr(native_module, "PACKED_AT_ONCE", at_once)
        room = kernels.room(bits, 1, *weight.shape)
        kernels.pack(bits, weight, room)
        packed.append(room)
    assert packed[0].any() and torch.equal(*packed)


@needs_compiler
def test_embeddings_in_bfloat16_are_those_in_float32(native: NativeKernels) -> None:
    table, step = torch.randn(50, 70).bfloat16(), SimpleNamespace(token_ids=torch.tensor([3, 49, 0, 3]))
    for factor in (torch.tensor(1.0), torch.tensor(8.5)):
        found = native.embed(step, table, factor)
        assert torch.equal(found, table.float()[step.token_ids] * factor)
        assert torch.equal(native.embed(step, table.float(), factor), found)


@needs_compiler
@pytest.mark.parametrize("size", [1, 16, 77, 576])
def test_norm_and_gate(native, reference, size: int) -> None:
    x, delta, weight, post = (
        torch.randn(5, size) * 3,
        torch.randn(5, size),
        torch.randn(size),
        torch.randn(size),
    )
    for args in ((None, None), (delta, None), (delta, post)):
        expected, residual = reference.add_norm(x, *args, weight, 1e-6, None)
        ours = x.clone()
        floats, same = native.add_norm(ours, *args, weight, 1e-6, FLOATS)
        close(floats, expected)
        close(same, residual)
        groups, _ = native.add_norm(x.clone(), *args, weight, 1e-6, INTEGERS)
        close(unpack(groups, size), expected, 0.51 / 127)
    floats, same = native.add_norm(x.clone(), delta, post, None, 1e-6, FLOATS)
    assert torch.equal(floats, same)
    close(same, residual)
    gate_up = torch.randn(5, 2 * size) * 20
    for activation in ("silu", "gelu_tanh"):
        expected = reference.gate(gate_up.clone(), activation)
        close(native.gate(gate_up, activation, FLOATS), expected)
        close(unpack(native.gate(gate_up, activation, INTEGERS), size), expected, 0.51 / 127)


@needs_compiler
def test_argmax_takes_the_first_of_equals(native) -> None:
    logits = torch.randn(9, 5001)
    logits[3, 70] = logits[3, 4000] = 99.0
    assert native.argmax(logits).tolist() == logits.argmax(-1).tolist()
    assert native.argmax(logits)[3] == 70


def steps_of(chance: random.Random, block_size: int, num_blocks: int, longest: int = 70) -> list[StepInput]:
    """A step of prompt chunks, then one of decodes and chunks that go on; blocks lie in random order."""
    free = chance.sample(range(num_blocks), num_blocks)
    contexts = [chance.randrange(2, longest) for _ in range(6)]
    first = [context - 1 for context in contexts[:3]] + [
        chance.randrange(1, context) for context in contexts[3:]
    ]
    tables = [[free.pop() for _ in range(-(-context // block_size))] for context in contexts]
    spans = [[(0, end) for end in first], list(zip(first, contexts, strict=True))]
    return [_step(tables, spans_of_step, block_size) for spans_of_step in spans]


def _step(tables: list[list[int]], spans: list[tuple[int, int]], block_size: int) -> StepInput:
    order = sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0] > 1)
    positions, slots, prefills, decodes = [], [], [], []
    for number in order:
        (begin, end), table = spans[number], tables[number]
        used = table[: -(-end // block_size)]
        if end - begin > 1:
            prefills.append(
                PrefillChunk(len(positions), len(positions) + end - begin, end, [torch.tensor(used)], [0])
            )
        else:
            decodes.append((used, end))
        positions += range(begin, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(begin, end)]
    width = max((len(used) for used, _ in decodes), default=0)
    padded = [used + [0] * (width - len(used)) for used, _ in decodes]
    return StepInput(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=[torch.tensor(slots)],
        decode_blocks=[torch.tensor(padded, dtype=torch.int64).view(len(decodes), width)],
        decode_begins=[torch.zeros(len(decodes), dtype=torch.int64)],
        decode_lengths=torch.tensor([end for _, end in decodes], dtype=torch.int64),
        prefills=prefills,
        logit_rows=torch.tensor([0]),
    )


TOLERANCES = {"float32": 5e-5, "bfloat16": 0.02, "int8": 0.03}
HEADS = [(1, 1, 8), (3, 3, 64), (2, 4, 40), (2, 1, 128)]
"""Heads of keys and values, heads of queries to each, size."""
MASKS = [(None, None), (5, None), (17, 3.0), (70, None)]
"""Window and softcap."""
ATTENTIONS = [
    (heads, mask, list(TOLERANCES)[(i + j) % 3])
    for (i, heads), (j, mask) in itertools.product(enumerate(HEADS), enumerate(MASKS))
]
"""Every two of heads, mask and cache together, though not every three."""


@needs_compiler
@pytest.mark.parametrize(("heads", "mask", "kv"), ATTENTIONS)
def test_attention(make: Make, reference, heads: tuple, mask: tuple, kv: str) -> None:
    """Rotary embedding, norms of queries and keys, cache writes and attention, over two steps."""
    (kv_heads, group, size), (window, softcap), tolerance = heads, mask, TOLERANCES[kv]
    chance = random.Random(kv_heads * 100 + size)
    torch.manual_seed(size)
    native = make(kv_dtype=kv)
    heads = kv_heads * group
    spec = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=size, norm_eps=1e-6, attention_scale=size**-0.5,
        attention_softcap=softcap, qk_norm="none" if window is None else "row" if window == 17 else "head",
    )  # fmt: skip
    each = {"none": (0, 0), "head": (size, size), "row": (heads * size, kv_heads * size)}[spec.qk_norm]
    q_norm, k_norm = (torch.rand(width) + 0.5 if width else None for width in each)
    layer = SimpleNamespace(
        group=0, q_norm=q_norm, k_norm=k_norm, spec=SimpleNamespace(window=window), out=FLOATS,
        sinks=torch.randn(heads) * 2 if window in (5, 17) else None,
    )  # fmt: skip
    angles = torch.rand(200, size // 2) * 6
    rope = torch.stack([angles.cos(), angles.sin()], dim=1)
    for block_size in (1, 4, 16):
        caches = [kernels.new_cache(1200, block_size, kv_heads, size) for kernels in (native, reference)]
        for step in steps_of(chance, block_size, 1200, 200):
            qkv = torch.randn(step.positions.shape[0], (heads + 2 * kv_heads) * size)
            expected = reference.attention(qkv, layer, spec, rope, caches[1], step)
            close(native.attention(qkv.clone(), layer, spec, rope, caches[0], step), expected, tolerance)
        layer.out = INTEGERS
        groups = native.attention(qkv.clone(), layer, spec, rope, caches[0], step)
        layer.out = FLOATS
        close(unpack(groups, heads * size), expected, tolerance + 0.51 / 127)


@needs_compiler
@pytest.mark.parametrize("isa", ["auto", "portable"])
def test_integer_attention_keeps_what_many_small_weights_add_up_to(make: Make, isa: str) -> None:
    """A token that outweighs each of the others a thousand times, and all of them together not at all."""
    native = make(kv_dtype="int8", cpu_isa=isa)
    size, tokens = 16, 2000
    spec = SimpleNamespace(
        num_heads=1, num_kv_heads=1, head_dim=size, norm_eps=1e-6, attention_scale=1.0,
        attention_softcap=None, qk_norm="none",
    )  # fmt: skip
    layer = SimpleNamespace(
        group=0, q_norm=None, k_norm=None, sinks=None, spec=SimpleNamespace(window=None), out=FLOATS
    )
    rope = torch.stack([torch.ones(tokens, size // 2), torch.zeros(tokens, size // 2)], dim=1)
    qkv = torch.zeros(tokens, 3 * size)
    qkv[:, 0] = 7.0
    qkv[70, size] = 1.0  # its key: e^7 to 1
    qkv[:, 2 * size] = 1.0
    qkv[70, 2 * size :] = torch.eye(size)[1]
    step = _step([list(range(-(-tokens // 16)))], [(0, tokens)], 16)
    out = native.attention(qkv, layer, spec, rope, native.new_cache(128, 16, 1, size), step)
    weight = math.exp(7) / (math.exp(7) + tokens - 1)
    assert out[-1, :2].tolist() == pytest.approx([1 - weight, weight], rel=0.01)
    assert out[69, :2].tolist() == pytest.approx([1, 0], rel=0.01)


@needs_compiler
@pytest.mark.parametrize("kv", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_does_not_depend_on_how_a_prompt_is_cut(make: Make, kv: str, window: int | None) -> None:
    """Bit for bit: at once, in chunks, or as decodes, on either side of where kernels cut it themselves."""
    native = make(kv_dtype=kv)
    heads, kv_heads, size, tokens, block_size = 6, 2, 32, 300, 16
    spec = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=size, norm_eps=1e-6, attention_scale=size**-0.5,
        attention_softcap=None, qk_norm="none",
    )  # fmt: skip
    layer = SimpleNamespace(
        group=0, q_norm=None, k_norm=None, sinks=None, spec=SimpleNamespace(window=window), out=FLOATS
    )
    angles = torch.rand(tokens, size // 2) * 6
    rope = torch.stack([angles.cos(), angles.sin()], dim=1)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size)
    table = list(range(-(-tokens // block_size)))

    def attention(ends: list[int]) -> torch.Tensor:
        cache, parts = native.new_cache(len(table), block_size, kv_heads, size), []
        for begin, end in itertools.pairwise([0, *ends]):
            step = _step([table], [(begin, end)], block_size)
            parts.append(native.attention(qkv[begin:end].clone(), layer, spec, rope, cache, step))
        return torch.cat(parts)

    whole = attention([tokens])
    for ends in ([7, 64, 65, 127, 200, 300], [63, 130, 191, 193, 299, 300], list(range(1, 301))):
        assert torch.equal(attention(ends), whole)


@needs_compiler
@pytest.mark.parametrize("precision", ["auto", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.inference_mode()
def test_the_whole_decoder_is_its_operations_one_by_one(
    make_engine, tmp_path: Path, library: str, family: str, precision: str
) -> None:
    """Bit for bit; where a row's logits are not wanted, the last layer's end leaves it out."""
    folder = tiny_checkpoint(tmp_path, family)
    engine = make_engine(folder, kernel_dir=library, weight_precision=precision, num_threads=2)
    model = engine.model
    assert model.embedding.dtype == torch.bfloat16, "as the file has it"
    for step in steps_of(random.Random(3), 4, 64):
        step.token_ids = torch.randint(3, 250, step.positions.shape)
        step.logit_rows = torch.arange(step.positions.shape[0])[1::2]
        x = model.kernels.embed(step, model.embedding, model.embedding_scale)
        expected = Operations.decode(model.kernels, model, x.clone(), engine.runner.caches, step)
        every = dataclasses.replace(step, logit_rows=None)
        whole = model.kernels.decode(model, x.clone(), engine.runner.caches, every)
        assert torch.equal(whole[1::2], expected)
        assert torch.equal(model.kernels.decode(model, x, engine.runner.caches, step), expected)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_tokens_do_not_depend_on_threads_or_neighbours(
    make_engine, library: str, threads: int, precision: str
) -> None:
    chance = random.Random(8)
    requests = [
        GenerationRequest([chance.randrange(3, 250) for _ in range(chance.randrange(1, 40))], 24, end_id=-1)
        for _ in range(9)
    ]
    settings = {
        "kernel_dir": library, "weight_precision": precision, "num_kv_blocks": 512, "max_num_tokens": 64,
    }  # fmt: skip
    engine = make_engine(num_threads=threads, max_batch_size=32, **settings)
    assert engine.kernels.name == "native"
    together = [output.token_ids for output in engine.generate(requests)]
    single = make_engine(num_threads=1, **settings)
    assert together == [single.generate([request])[0].token_ids for request in requests]
    if precision == "auto":
        plain = make_engine(kernels="pytorch").generate(requests)
        assert together == [output.token_ids for output in plain]


@needs_compiler
def test_the_instruction_set_can_be_forced(make: Make) -> None:
    assert make().isa == available_isas()[0]
    assert make(cpu_isa="portable").isa == "portable"
    for isa in set(ISAS) - set(available_isas()):
        with pytest.raises(ConfigError, match=f"cpu_isa='{isa}' does not run on this CPU"):
            make(cpu_isa=isa)


@needs_compiler
def test_a_compiler_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoCompiler, match="failed"):
        compile_library(tmp_path, extra_flags=("-not-a-flag",))
    assert not list(tmp_path.iterdir()), "nothing half-written"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="no C\\+\\+ compiler"):
        compile_library(tmp_path)


def test_a_compiler_works_where_its_output_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files and all, so that the next build removes what a killed one has left."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\necho "$TMPDIR $@" >> {tmp_path}/log\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    folder = tmp_path / "engine"
    folder.mkdir()
    with pytest.raises(NoCompiler, match="failed"):
        compile_library(folder, ["portable"])
    temporary, *arguments = (tmp_path / "log").read_text().split()
    assert Path(temporary).parent == folder and f"{temporary}/kernels-portable.so" in arguments
    assert not list(folder.iterdir())


@needs_compiler
def test_a_library_with_other_structs_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was compiled from sources of another version: two fields exchanged, or one that is new."""
    first, *others = native_module.AttentionStep._fields_

    class Exchanged(ctypes.Structure):
        _fields_ = (others[0], first, *others[1:])

    class Longer(ctypes.Structure):
        _fields_ = (first, *others, ("new", ctypes.c_int64))

    make()
    before, _, *after = native_module.STRUCTS
    for other, says in (
        (Exchanged, "Exchanged is another one: 56 rows 0 chunks 8 .*, not 56 chunks 0 rows 8 "),
        (Longer, "Longer is another one: 56 .*, not 64 .* new 56"),
    ):
        monkeypatch.setattr(native_module, "STRUCTS", (before, other, *after))
        with pytest.raises(ConfigError, match=f"{says}.*make build-engines"):
            make()


def test_a_library_that_cannot_run_is_refused_with_the_remedy(make_engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no kernels.*make build-engines"):
        make_engine(kernel_dir=str(tmp_path))
    (tmp_path / f"kernels-{available_isas()[0]}.so").write_bytes(b"not a library")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*make build-engines"):
        make_engine(kernel_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="make build-engines"):
        make_engine(kernels="native")
    with pytest.raises(ConfigError, match="kernels='fast'"):
        make_engine(kernels="fast")
