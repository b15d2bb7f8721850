"""The Triton-language kernels compile for real GPUs, on a machine that has none.

What the interpreter cannot show: types, shared memory, and whether the tensor cores are used.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.torch_engine import machine_code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton's language is not installed: pip install triton",
    ),
]

COMPILE = """
import hashlib, json, re, sys
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Driver())
found = {}

def compile_only(self, grid):
    def run(*args, **options):
        kernel = self.run(*args, grid=grid, warmup=True, **options)
        code = kernel.asm["ptx"]
        units = [unit for unit in ("wgmma.mma_async", "mma.sync") if unit in code]
        units += [unit for unit in ("st.global.wt.v", "ld.volatile.global") if unit in code]
        bytewise = code.count("ld.shared.b8") + code.count("ld.shared.u8")
        loop = kernel.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
        between = loop.count("ttg.convert_layout")
        found.setdefault(self.__name__, []).append([kernel.metadata.shared, units, bytewise, between])
        if re.search(r"wgmma\\.mma_async[^;]*}, *{", code):  # its left operand is in registers
            code = kernel.asm["cubin"]
            Path(sys.argv[2], f"{self.__name__}-{hashlib.sha256(code).hexdigest()[:16]}.cubin").write_bytes(code)
    return run

JITFunction.__getitem__ = compile_only
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda: divmod(int(sys.argv[1]), 10)
from types import SimpleNamespace
from flightline.torch_engine.kernels.gpu.activation import Activation, Form
from flightline.torch_engine.kernels.gpu.attention import attend, decode_plan, usual_prefill_plans
from flightline.torch_engine.kernels.gpu.exchange import Exchange
from flightline.torch_engine.kernels.gpu.four_bits import FourBitLinear
from flightline.torch_engine.kernels.gpu.gathered import (
    GatheredPlan, GatheredScratch, ahead_plans, attend_gathered, gathered_plans,
)
from flightline.torch_engine.kernels.gpu.grouped import GroupedCodes, GroupedLinear, Scratch
from flightline.torch_engine.kernels.gpu.kv_cache import (
    AttentionInput, KVCache, SharedPrefixes, rotate_write, row_means, scatter,
)
from flightline.torch_engine.kernels.gpu.linear import dequantise, quantise, skinny_linear, skinny_plans
from flightline.torch_engine.kernels.gpu.mixture import CudaMixture, Experts
from flightline.torch_engine.kernels.gpu.norm import add_norm, add_up, gate
from flightline.torch_engine.kernels.gpu.shared_prefix import PrefixPlan, attend_prefixes
from flightline.torch_engine.kernels.gpu.tokens import argmax, embed, remember
from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.parallel.group import Alone, Boxes

class Three(Alone):
    size, stack = 3, lambda self, x: torch.stack([x, x, x])

hopper = sys.argv[1] == "90"
scratch = Scratch(torch.bfloat16, torch.device("cpu"))
bf16, one, ints = torch.bfloat16, torch.ones(()), torch.zeros(4, dtype=torch.int32)
form = Form.FP8_STATIC if hopper else Form.INT8_TOKEN
x = torch.zeros(4, 4096, dtype=bf16)
embed(ints, ints, ints, x, 1.0)
for delta in (None, x, torch.zeros(4, 4, 4096)):
    add_norm(x, delta, None, x[0], 1e-5, form, one)
gate(torch.zeros(4, 28672, dtype=bf16), "silu", bf16, form, one)
quantise(x, Form.FP8_TOKEN if hopper else form)
argmax(x, ints, ints, ints, None, ints, ints)
argmax(x, ints, ints, ints, None, ints, ints, 4096, Three())
remember(ints, ints, ints)
add_up(torch.zeros(4, 4, 4096), x)
dequantise(torch.zeros(32, 64, dtype=torch.int32), one[None], torch.zeros(64), None, bf16)
scatter(torch.zeros(9, 9, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32))
kind = torch.float8_e4m3fn if hopper else torch.int8
cache = KVCache(torch.zeros(2, 2, 8, 16, 128, dtype=kind), None if hopper else torch.zeros(2, 2, 8, 16))
step = AttentionInput(ints, ints, torch.zeros(4, 256, dtype=torch.int32), 4, torch.zeros(2, 4, dtype=torch.int32))
qkv = torch.zeros(4, 48 * 128, dtype=bf16)
rotate_write(qkv, cache, step, torch.zeros(9, 2, 64), 32)
rotate_write(qkv, cache, step, torch.zeros(9, 2, 64), 32, x[0], x[0], 1e-5, bf16, True, row_means(qkv, 32, 8, 128, 2))
boxes = Boxes(torch.zeros(Exchange.bytes_for(2, 4096, bf16), dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
for delta in (x, torch.zeros(4, 4, 4096)):
    Exchange(boxes, 1, 2, 4096, bf16).add_norm(x, delta, None, x[0], 1e-5, form, one)
Exchange(boxes, 1, 2, 4096, bf16).stack(torch.zeros(2, 4, 64))
form = Form.FP8_STATIC if hopper else Form.PLAIN
for sequences in (1, 64, 256):
    plan = decode_plan(sequences, 8, 4, 128, cache.values.element_size(), 132, 100_000)
    attend(qkv, cache, step, 32, 0.1, None, None, plan, form, one)
for prefill in usual_prefill_plans(bf16, 128):
    attend(qkv, cache, step, 32, 0.1, None, None, plan, form, one, prefill)
prefix_plan = PrefixPlan.of(cache, 32, bf16, 132)
step.prefixes = SharedPrefixes(torch.zeros(3, 4, dtype=torch.int32), ints, torch.zeros(2, 4, dtype=torch.int32))
for plan in (*prefix_plan.others(bf16, 128), prefix_plan):
    prefix = attend_prefixes(qkv, cache, step, 32, 0.1, None, None, plan)
plan = decode_plan(256, 8, 4, 128, cache.values.element_size(), 132, 100_000)
attend(qkv, cache, step, 32, 0.1, None, None, plan, form, one, prefix=prefix)
if hopper:
    step.spans, step.offsets = torch.zeros(1, 4, dtype=torch.int32), ints
    for turned in (False, True) if cache.values.dtype == torch.float8_e4m3fn else (False,):
        laid = GatheredScratch.new(cache, bf16, 128, turned)
        for tile in gathered_plans(bf16, 128)[0 if turned else -1 :]:
            gathered = GatheredPlan(tile, laid)
            attend_gathered(qkv, cache, step, 32, 0.1, None, gathered, torch.zeros(4, 4096, dtype=bf16), Form.PLAIN)
        for gathered in ahead_plans(laid, None, False):
            attend_gathered(qkv, cache, step, 32, 0.1, None, gathered, torch.zeros(4, 4096, dtype=bf16), Form.PLAIN)
    codes = torch.zeros(6144, 4096, dtype=torch.float8_e4m3fn)
    plans = skinny_plans(6144, 4096, 132)
    for plan in (plans[0], plans[-1]):
        skinny_linear(codes[:1], codes, one, one, plan)
    skinny_linear(codes[:1], codes, torch.ones(1), torch.ones(6144), plans[0])
# gpt-oss: sinks, and experts in MXFP4 with biases, of a row by itself and in blocks; widths end within a block.
step = AttentionInput(ints, ints, torch.zeros(4, 256, dtype=torch.int32), 4, torch.zeros(2, 4, dtype=torch.int32))
attend(torch.zeros(4, 80 * 64, dtype=bf16), KVCache(cache.values[..., :64], cache.scales), step, 64, 0.1, 128, None,
       decode_plan(4, 8, 8, 64, 2, 132, 128), Form.PLAIN, None, None, torch.zeros(64))
spec = MixtureSpec(32, 4, 2880, normalise=True, router_bias=True, expert_bias=True, clamp=7.0)
experts = []
for outputs in (5760, 2880):
    nothing = torch.zeros(outputs, 2880, dtype=torch.uint8)
    stored = Coded(nothing, torch.ones(outputs, 90).bfloat16(), 32, bits=4, e2m1=True)
    experts.append(Experts.of_codes(GroupedCodes.of(stored), outputs, 2880).with_bias(torch.zeros(outputs)))
mixture = CudaMixture(spec, torch.zeros(32, 2880, dtype=bf16), None, *experts, None, "silu", bf16, torch.zeros(32), 132)
mixture.few_outputs = 128
mixture.try_few()
mixture.few_outputs = 64
for rows in (1, 64, 1024) if hopper else (1, 64):
    where = SimpleNamespace(slots=torch.zeros(rows, dtype=torch.int32))
    mixture(Activation(torch.zeros(rows, 2880, dtype=bf16)), SimpleNamespace(attention=where, idle=9))
zeros = torch.zeros(6144, 4096, dtype=torch.uint8)
stored = [Coded(zeros, torch.ones(6144, 32).half(), 128, zeros[:, :32], 4)]
if hopper:
    stored.append(Coded(codes, torch.ones(6144, 32), 128))
linears = [GroupedLinear(coded, None, bf16, scratch, 132) for coded in stored]
for linear in (FourBitLinear(stored[0], None, bf16, scratch, 132), *linears):
    for rows in (1, 64):
        linear(Activation(torch.zeros(rows, 4096, dtype=bf16)))
    seen = set()  # pieces of the inputs change nothing
    for plan in linear.many_plans() if hopper else ():
        if (shape := (plan.rows, plan.block_n, plan.ahead)) in seen or not (plan.ahead or plan.scaled or not seen):
            continue
        seen.add(shape)
        linear.choose(512, plan)
        linear(Activation(torch.zeros(512, 4096, dtype=bf16)))
    linear.weight()

def experts_like(coded, outputs, inputs):
    def one(rows, columns):
        groups = -(-columns // coded.group)
        zeros = None if coded.offsets is None else coded.offsets[:rows, :groups]
        part = Coded(coded.codes[:rows, :columns], coded.scales[:rows, :groups], coded.group, zeros, coded.bits,
                     e2m1=coded.e2m1)
        return Experts.of_codes(GroupedCodes.of(part), rows, columns).room(16)
    return one(2 * inputs, outputs), one(outputs, inputs)

fours = Coded(zeros, torch.ones(6144, 256), 16, bits=4, e2m1=True)
for coded in (*stored, fours):
    mixture = CudaMixture(MixtureSpec(16, 8, 768), torch.zeros(16, 2048, dtype=bf16), None,
                          *experts_like(coded, 2048, 768), None, "silu", bf16, None, 132)
    for rows in (1, 512):
        step = SimpleNamespace(attention=SimpleNamespace(slots=torch.zeros(rows, dtype=torch.int32)), idle=-1)
        mixture(SimpleNamespace(values=torch.zeros(rows, 2048, dtype=bf16)), step)
from flightline.torch_engine.kernels.gpu.sampling_ops import sample
from flightline.torch_engine.kernels.gpu.sampling_tables import Choice, Tables
tables = Tables.empty(4, 128256, torch.device("cpu"))
choice = Choice.empty(4, "cpu")
logits = torch.zeros(4, 128256, dtype=bf16)
# Half of the whole time. All that the longer form adds is done element by element, so each target compiles one form.
if hopper:
    sample(logits, None, None, None, ints, ints, tables, ints, choice)
else:
    sample(logits, torch.zeros(128256), 30.0, ints, ints, ints, tables, ints, choice)
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "shared_limit"), [(90, 227 * 1024), (80, 163 * 1024)])
def test_kernels_compile(capability: int, shared_limit: int, tmp_path) -> None:
    command = [sys.executable, "-c", COMPILE, str(capability), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(shared <= shared_limit for kernels in found.values() for shared, *_ in kernels)
    gathers = ["_gathered_kernel", "_ahead_kernel"] if capability == 90 else []
    for name in ("_prefill_kernel", "_prefix_kernel", *gathers):
        used = {unit for _, units, *_ in found[name] for unit in units}
        assert used == ({"wgmma.mma_async"} if capability == 90 else {"mma.sync"})
    assert all(units == ["mma.sync"] for _, units, *_ in found["_decode_kernel"])
    units = ["wgmma.mma_async"] if capability == 90 else ["mma.sync"]
    assert all(used == units for _, used, *_ in found["_product_kernel"])
    # Each word goes to another GPU at once, and is looked for again and again.
    exchanges = found["_exchange_kernel"] + found["_stack_kernel"]
    assert all(units == ["st.global.wt.v", "ld.volatile.global"] for _, units, *_ in exchanges)
    # 4-bit codes become numbers where the tensor cores read them.
    assert not any(between for *_, between in found["_four_bit_product_kernel"])
    for kernel in ("_rows_in_kernel", "_rows_out_kernel", "_blocks_kernel"):
        assert all(used == units for _, used, *_ in found[kernel]), kernel
    # The tensor cores' operands come in whole words: byte by byte would cost more than the product.
    attention = found["_decode_kernel"] + found["_prefill_kernel"] + found["_prefix_kernel"]
    assert not any(bytewise for _, _, bytewise, _ in attention)
    cubins = sorted(tmp_path.glob("*.cubin"))
    with ThreadPoolExecutor(2) as pool:
        for cubin, sass in zip(cubins, pool.map(machine_code.disassembled, cubins), strict=True):
            assert machine_code.register_products(sass), cubin.name
            assert not machine_code.overwritten(sass), cubin.name
    assert len(list(tmp_path.glob("_blocks_kernel-*.cubin"))) >= (8 if capability == 90 else 0)


SASS = """
.L_x_0:
        /*0000*/                   LDSM.16.M88.4 R{loaded}, [R12] ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR16], R56 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR16], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0050*/              @!P1 LDS.U16 R{between}, [R9] ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("loaded", "left", "between", "faults"),
    [
        (4, "0x0", 96, []),  # waited for before
        (4, "0x1", 8, []),
        (4, "0x1", 96, ["0020"]),
        (100, "0x1", 8, ["0030"]),  # in the next turn
        (98, "0x1", 8, ["0020", "0030"]),
    ],
)
def test_registers_that_are_written_too_early_are_found(
    loaded: int, left: str, between: int, faults: list[str]
) -> None:
    sass = SASS.format(loaded=loaded, left=left, between=between)
    assert machine_code.register_products(sass) == 2
    assert [fault.split()[0] for fault in machine_code.overwritten(sass)] == faults
