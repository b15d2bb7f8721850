"""Later starts of a kernel take a short way: the same code with the same arguments as by Triton's own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton's language is not installed: pip install triton",
)

STARTS = """
import json
from types import SimpleNamespace
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

starts, here = [], SimpleNamespace(device=0)

class Driver:
    binary_ext = "cubin"
    utils = SimpleNamespace(
        load_binary=lambda *body: (0, object(), 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return here.device
    def get_current_stream(self, device=None): return 77 + here.device
    def launcher_cls(self, source, metadata):
        def start(x, y, z, stream, function, *rest):
            arguments = [str(type(a)) if isinstance(a, torch.Tensor) else a for a in rest[4:]]
            starts.append([[x, y, z], stream, id(function), metadata.num_warps, arguments])
        return start

driver.set_active(Driver())
from flightline.torch_engine.kernels.gpu.launch import kernel

def add(x, count, scale, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + at, tl.load(x + at, mask=at < count) * scale, mask=at < count)

short = kernel(do_not_specialize=["scale"])(add)
plain = triton.jit(do_not_specialize=["scale"])(add)
floats, halves = torch.zeros(65), torch.zeros(65, dtype=torch.bfloat16)
forms = [
    ((4,), (floats, 33, 2, 16), {"num_warps": 4}),
    ((4, 2), (floats, 35, 7, 16), {"num_warps": 4}),
    ((4,), (floats[1:], 33, 2, 16), {"num_warps": 4}),
    ((4,), (halves, 33, 2, 16), {"num_warps": 4}),
    ((4,), (floats, 32, 2, 16), {"num_warps": 4}),
    ((4,), (floats, 1, 2, 16), {"num_warps": 4}),
    ((4,), (floats, 33, 2**40, 16), {"num_warps": 4}),
    ((4,), (floats, 33, 2, 32), {"num_warps": 4}),
    ((4, 1, 3), (floats, 33, 2, 16), {"num_warps": 8}),
]
found = {}
for name, one in (("plain", plain), ("short", short), ("again", short)):
    for device in (0, 1):
        here.device = device
        for grid, args, options in forms:
            one[grid](*args, **options)
    found[name] = list(starts)
    starts.clear()
compiled = []
run = JITFunction.run
def counted(self, *args, **options):
    compiled.append(self.__name__)
    return run(self, *args, **options)
JITFunction.run = counted
here.device = 0
short[(4,)](*forms[0][1], num_warps=4)
found["long_ways"] = len(compiled)
print(json.dumps(found))
"""


def test_the_short_way_starts_what_tritons_own_starts(tmp_path: Path) -> None:
    script = tmp_path / "starts.py"  # a kernel's source must lie in a file
    script.write_text(STARTS)
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["long_ways"] == 0
    for name in ("short", "again"):
        same_code: dict[int, int] = {}
        for ours, tritons in zip(found[name], found["plain"], strict=True):
            assert ours[:2] + ours[3:] == tritons[:2] + tritons[3:]  # grid, stream, warps, arguments
            assert same_code.setdefault(tritons[2], ours[2]) == ours[2]
        assert len(set(same_code.values())) == len(same_code)
    codes = [code for *_, code, _, _ in found["again"]]
    assert codes[0] == codes[1]  # numbers that Triton does not look at
    assert len(set(codes[:9])) == 8
    assert not set(codes[:9]) & set(codes[9:])  # a device has its own
