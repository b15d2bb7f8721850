"""A step of a GPU by what its kernels are for: benchmarks/kernel_groups.py."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.kernel_groups import GROUPS, Kernel, group_of, spent

KERNELS = Path(__file__).parents[2] / "torch_engine/kernels/gpu"


def test_a_step_is_its_groups_and_its_gaps() -> None:
    """Where kernels overlap the later one waits; two steps."""
    seen = [
        Kernel("_exchange_kernel", 9, 20),
        Kernel("_embed_kernel", 0, 2),
        Kernel("_skinny_kernel", 1, 10),
        Kernel("Memcpy HtoD (Pinned -> Device)", 25, 26),
        Kernel("void at::native::nothing_known", 26, 27),
        Kernel("_embed_kernel", 30, 31),
    ]
    found = spent(seen)
    assert found.pop("steps") == 2 and found.pop("step") == 15.5 == sum(found.values())
    assert {name: us for name, us in found.items() if us} == {
        "inputs": 2.0, "linears": 4.0, "sums of ranks": 5.0, "others": 0.5, "gaps": 4.0,
    }  # fmt: skip
    assert spent([]) == {}


def test_every_kernel_of_a_dense_step_has_a_group() -> None:
    """A new one is put into the table; those of mixtures count as others."""
    sources = (path.read_text() for path in KERNELS.glob("*.py") if path.name != "mixture.py")
    names = [name for source in sources for name in re.findall(r"^def (\w*kernel)\(", source, re.MULTILINE)]
    assert (
        len(names) > 20
        and [name for name in names if group_of(name) == "others" and name != "begin_kernel"] == []
    )
    assert group_of("nvjet_qqtst_64x8_128x16") == "linears" and group_of("void at::native::copy") == "others"
    assert group_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL") == next(iter(GROUPS))
