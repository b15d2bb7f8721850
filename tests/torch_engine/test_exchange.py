"""Sums over the ranks in one kernel with the norm, in Triton's interpreter: ranks in one process, or each in its own.

On GPUs ``test_tp_gpu.py`` has the engine with it, over real links.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flightline.torch_engine.parallel.group import Alone, Boxes
from tests.torch_engine.test_triton_ops import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    RUNS,
    close,
    expanded,
    form_tolerance,
    kernel,
    rms,
)

if RUNS:
    from flightline.torch_engine.kernels.gpu import exchange as module
    from flightline.torch_engine.kernels.gpu.activation import Activation, Form
    from flightline.torch_engine.kernels.gpu.exchange import STACK_BLOCK, STACK_BLOCKS, Exchange, most_rows
    from flightline.torch_engine.kernels.gpu.norm import add_norm

ROOT = Path(__file__).parents[2]


def exchanges(ranks: int, size: int, dtype: torch.dtype) -> list[Exchange]:
    """Of all ranks, in this process."""
    owned = [
        torch.zeros(Exchange.bytes_for(ranks, size, dtype), dtype=torch.uint8, device=DEVICE)
        for _ in range(ranks)
    ]
    table = torch.tensor([own.data_ptr() for own in owned], device=DEVICE)
    every = [Exchange(Boxes(own, table), rank, ranks, size, dtype) for rank, own in enumerate(owned)]
    for exchange in every:
        exchange.empty()
    return every


def at_once(every: list[Exchange], call: Callable[[Exchange, bool], Any]) -> list[Any]:
    """What ``call`` returns on each rank, which come one after the other here: first all send, then all find it there.

    The second time a rank sends the same again.
    """
    for exchange in every:
        before = exchange._turns.clone(), exchange._tags.clone()
        exchange.tries = 1
        call(exchange, True)
        exchange._turns.copy_(before[0])
        exchange._tags.copy_(before[1])
    return [call(exchange, False) for exchange in every]


class TestKernel:
    pytestmark = kernel

    @pytest.mark.parametrize("form", [0, 1, 3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("ranks", "parts", "post"), [(2, 3, False), (3, 1, True), (4, 1, False)])
    def test_is_the_norm_of_the_sum(
        self, ranks: int, parts: int, post: bool, dtype: torch.dtype, form: int
    ) -> None:
        """Again and again, with other numbers of rows: places in the boxes take turns, and rows count apart."""
        size, form, eps = 84, Form(form), 1e-5
        scale, weight = torch.tensor(0.02, device=DEVICE), torch.rand(size, device=DEVICE) + 0.5
        every = exchanges(ranks, size, dtype)
        for rows in (3, 1, 1, 3, 1):
            x = torch.randn(rows, size, device=DEVICE).to(dtype)
            shares = torch.randn(ranks, parts, rows, size, device=DEVICE)
            if parts == 1:
                shares = shares.to(dtype)
            residuals = [x.clone() for _ in every]

            def call(exchange: Exchange, tries: bool, x=x, shares=shares, residuals=residuals) -> Activation:
                share, own = shares[exchange._rank], residuals[exchange._rank]
                return exchange.add_norm(
                    own.clone() if tries else own, share if len(share) > 1 else share[0],
                    weight if post else None, weight, eps, form, scale,
                )  # fmt: skip

            results = at_once(every, call)
            total = shares.float().sum(1).to(dtype).float().sum(0)  # each rank rounds its own share
            expected = x.float() + (rms(total, weight) if post else total)
            for residual, result in zip(residuals, results, strict=True):
                assert torch.equal(residual, residuals[0])  # the same bits on all ranks
                assert torch.equal(result.values.float(), results[0].values.float())
                close(residual, expected, 1e-6 if dtype == torch.float32 else 4e-3)
                alone = add_norm(residual.clone(), None, None, weight, eps, form, scale)
                close(
                    expanded(result, form, scale), expanded(alone, form, scale), form_tolerance(form, dtype)
                )

    def test_what_another_rank_has_not_sent_is_not_taken_for_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor what it sent before. So the trial of a rank that is alone fails, and ends."""
        monkeypatch.setattr(module, "TRIES", 3)
        first, second = exchanges(2, 16, torch.float32)
        x = torch.ones(1, 16, device=DEVICE)
        for _ in range(4):  # more than there are places
            at_once([first, second], lambda exchange, _: exchange.add_norm(x.clone(), x, None, None, 1e-5))
        for _ in range(4):
            own = x.clone()
            first.tries = 2
            first.add_norm(own, x, None, None, 1e-5)
            assert torch.equal(own, x + x)
        assert not first.works(torch.float32)

    def test_minus_zero_is_sent_as_zero(self) -> None:
        """It would never be there."""
        every = exchanges(2, 16, torch.bfloat16)
        x = torch.full((1, 16), 2.0, dtype=torch.bfloat16, device=DEVICE)
        sums = [x.clone() for _ in every]

        def call(exchange: Exchange, tries: bool) -> Activation:
            own = sums[exchange._rank]
            return exchange.add_norm(own.clone() if tries else own, x * -0.0, None, None, 1e-5)

        assert bool(torch.signbit(x * -0.0).all())
        at_once(every, call)
        assert all(torch.equal(own, x) for own in sums)
        places = every[0]._box[: 3 * 2 * most_rows(2) * 16].view(3, 2, most_rows(2), 16)
        assert bool((places[0, 1, 0] == 0).all()) and bool((places[1] == every[0]._empty).all())

    @pytest.mark.parametrize("shape", [(2, 1, 64), (2, 10, 64), (3,)])
    def test_puts_side_by_side_what_each_has(self, shape: tuple[int, ...]) -> None:
        """Beside sums, in boxes of its own; more than is meant for it goes another way."""
        every = exchanges(3, 16, torch.float32)
        for number in range(3):
            found = torch.randn(3, *shape, device=DEVICE)
            x = torch.ones(every[0].rows if shape == (3,) and number == 2 else 2, 16, device=DEVICE)
            at_once(every, lambda exchange, _, found=found: exchange.stack(found[exchange._rank]))
            sums = [x.clone() for _ in every]
            at_once(
                every,
                lambda exchange, tries, sums=sums, x=x: exchange.add_norm(
                    sums[exchange._rank].clone() if tries else sums[exchange._rank], x, None, None, 1e-5
                ),
            )
            assert all(torch.equal(own, 4 * x) for own in sums), number
            stacked = at_once(every, lambda exchange, _, found=found: exchange.stack(found[exchange._rank]))
            assert all(torch.equal(each, found) for each in stacked)
        every[0]._beyond = lambda x: x[None]
        large = torch.zeros(STACK_BLOCKS * STACK_BLOCK + 1, device=DEVICE)
        assert every[0].stack(large).shape == (1, len(large))

    def test_a_tag_may_wrap(self) -> None:
        every = exchanges(2, 16, torch.float32)
        for exchange in every:
            exchange._tags.fill_(2**31 - 2)
        for number in range(5):
            found = torch.full((2, 3), number, dtype=torch.int32, device=DEVICE) + every[0].size
            stacked = at_once(every, lambda exchange, _, found=found: exchange.stack(found[exchange._rank]))
            assert all(torch.equal(each, found) for each in stacked)
        assert int(every[0]._tags[0]) == -(2**31) + 3

    def test_is_taken_if_it_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Boxed(Alone):
            def boxes(self, size: int) -> Boxes:
                own = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
                return Boxes(own, torch.tensor([own.data_ptr()], device=DEVICE))

        found = Exchange.between(Boxed(), 16, torch.float32)
        assert found is not None and found.tries == 0 and found.rows == most_rows(1)
        assert Exchange.between(Alone(), 16, torch.float32) is None
        monkeypatch.setattr(Exchange, "add_norm", lambda *args: None)
        assert Exchange.between(Boxed(), 16, torch.float32) is None


PROCESS = """
import sys, time, torch
from pathlib import Path
from tests.torch_engine.quick_interpreter import quicken
quicken()
from flightline.torch_engine.kernels.gpu.exchange import Exchange
from flightline.torch_engine.parallel.group import Boxes
rank, ranks, size, dtype = int(sys.argv[1]), len(sys.argv) - 2, 32, torch.float16
count = Exchange.bytes_for(ranks, size, dtype)
boxes = [torch.from_file(name, shared=True, size=count, dtype=torch.uint8) for name in sys.argv[2:]]
exchange = Exchange(Boxes(boxes[rank], torch.tensor([box.data_ptr() for box in boxes])), rank, ranks, size, dtype)
exchange.empty()
Path(sys.argv[2 + rank] + ".empty").touch()
while not all(Path(name + ".empty").exists() for name in sys.argv[2:]):
    time.sleep(0.01)
for number in range(12):
    rows = 1 + number % 3
    x = torch.zeros(rows, size, dtype=dtype)
    exchange.add_norm(x, torch.full_like(x, number + rank), None, None, 1e-5)
    assert bool((x == ranks * number + sum(range(ranks))).all()), (number, x)
print("right")
"""


@pytest.mark.skipif(not (RUNS and INTERPRETED), reason="runs in test_kernels_in_the_interpreter")
def test_ranks_that_run_at_the_same_time(tmp_path: Path) -> None:
    """Processes that share the memory of the boxes: they wait for each other, and none overtakes another one."""
    names = [str(tmp_path / f"box{rank}") for rank in range(2)]
    for name in names:
        Path(name).write_bytes(bytes(Exchange.bytes_for(2, 32, torch.float16)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), *names], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            said, failed = process.communicate(timeout=240)
            assert said == "right\n", failed[-2000:]
    finally:
        for process in processes:
            process.kill()
