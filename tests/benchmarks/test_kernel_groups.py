"""A step of a GPU by what its kernels are for: benchmarks/kernel_groups.py."""

from __future__ import annotations

from benchmarks.kernel_groups import Kernel, group_of, spent


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


def test_kernels_have_groups() -> None:
    assert (
        group_of("_exchange_kernel")
        == group_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL")
        == "sums of ranks"
    )
    assert (
        group_of("ncclDevKernel_AllGather_RING_LL") == group_of("_argmax_part_kernel") == "choice of tokens"
    )
    assert group_of("_skinny_kernel") == group_of("nvjet_qqtst_64x8_128x16") == "linears"
    assert group_of("_add_norm_kernel") == "norms and gates" and group_of("_decode_kernel") == "attention"
    assert group_of("void at::native::copy") == "others"
