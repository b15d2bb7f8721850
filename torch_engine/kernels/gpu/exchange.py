"""A few rows' sums over the GPUs that share a model, in one kernel with the residual sum and the norm after them; and
what each rank has found, side by side.

Each rank has a box: memory that the others write to over NVLink (``Group.boxes``; no multicast). A kernel's program has
one row. It writes its rank's share of the row into the boxes of all others, waits for theirs in its own, and adds up
all shares in the order of ranks, so that every rank gets the same bits. Nobody asks anybody for anything: a row takes
one way over the link, not the way there and back.

The protocol of sums, named after Lamport in NVIDIA's TensorRT-LLM, where it comes from:

* A number is there when it is not -0.0, which a share never has: 0.0 is sent instead. So no flag or fence is needed,
  each number may come by itself, and the link carries nothing but them.
* A row has three places in a box, used in turns (``turns`` counts in memory, since a CUDA graph repeats its arguments).
  An exchange uses its place and fills the one before with -0.0 again: that one's numbers have all come and been read.
  All ranks run the same kernels in the same order, so they count alike.
* Who sends exchange t + 2 has ended its kernel of t + 1, so all others had begun theirs of t + 1, and ended theirs of
  t, in which they filled the place that is used now. No barrier is needed. That wants kernels on one stream, each of
  which waits for the end of the one before (``begin_kernel``).
* A row waits for the same row of the others only, and each rank starts its rows in their order: that ends, however few
  of them the device runs at once. If another rank never comes, it does not end; who watches the ranks ends the process
  (``parallel/ranks.py``). While the kernel is tried out (:meth:`Exchange.works`), it gives up.

What is put side by side may be any bits. There a word of 8 bytes is a tag, which counts the exchanges of a block and
may wrap, and 4 bytes; it is written and read at once, so the tag says that its 4 bytes are there. Two places in turns
are enough: a word left in a box is two exchanges old, and only words with exactly the tag count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from flightline.torch_engine.kernels.gpu.activation import (
    Activation,
    Form,
    known_scale,
    new_output,
    parts_of,
    sum_parts,
    warps_of,
)
from flightline.torch_engine.kernels.gpu.launch import (
    LAUNCH,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
)
from flightline.torch_engine.kernels.gpu.norm import add_and_norm, norm_weights
from flightline.torch_engine.parallel.group import Boxes, Group

STACK_BLOCK, STACK_BLOCKS = 1024, 16
"""Numbers of 4 bytes, as of the likeliest tokens of 128 rows: few enough that one way over the link is the shortest."""
WORD, ALIGNMENT = 8, 16
TRIES = 1 << 22
"""How often a row is looked for while the kernel is tried out: some seconds."""
PLACES = tl.constexpr(3)


def most_rows(ranks: int) -> int:
    """Of a sum: each rank sends its share to all others, so more ranks send more."""
    return 512 // ranks


@triton.jit
def _box_of(address, dtype: tl.constexpr):
    """Another rank's; aligned, or each number would be stored by itself."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _missing(numbers, EMPTY: tl.constexpr):
    return tl.max(tl.where(numbers == EMPTY, 1, 0), 0)


@triton.jit
def _share(source, mask, tries, EMPTY: tl.constexpr):
    """The bits of a row in the own box, when all are there; 0 ``tries`` are as many as it takes."""
    numbers = tl.load(source, mask=mask, other=0, volatile=True)
    left = tries - 1
    while (_missing(numbers, EMPTY) != 0) & (left != 0):
        numbers = tl.load(source, mask=mask, other=0, volatile=True)
        left -= 1
    return numbers


@triton.jit
def _late(word, tag):
    return tl.max(tl.where((word >> 32).to(tl.int32) != tag, 1, 0), 0)


@triton.jit
def _taken(source, tag, tries):
    """The 4 bytes of each word of the own box, when all of them have the tag."""
    word = tl.load(source, volatile=True)
    left = tries - 1
    while (_late(word, tag) != 0) & (left != 0):
        word = tl.load(source, volatile=True)
        left -= 1
    return word.to(tl.int32)


@kernel(do_not_specialize=["step", "tries"])
def _exchange_kernel(
    x, delta, step, post, weight, out, scales, in_scale, eps, box, boxes, turns, tries,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_POST: tl.constexpr, NORM: tl.constexpr,
    FORM: tl.constexpr, EMPTY: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    of_post, of_norm = norm_weights(post, weight, columns, mask, HAS_POST, NORM)
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    turn = tl.load(turns + row)
    SHARE: tl.constexpr = ROWS * N
    place = turn * (RANKS * SHARE) + row * N + columns
    before = (turn + PLACES - 1) % PLACES * (RANKS * SHARE) + row * N + columns
    bits = box.dtype.element_ty
    own = (
        sum_parts(delta + row * N + columns, step, mask, PARTS).to(x.dtype.element_ty).to(bits, bitcast=True)
    )
    own = tl.where(own == EMPTY, 0, own)
    for other in tl.static_range(1, RANKS):  # not all to the same one first
        target = _box_of(boxes + (RANK + other) % RANKS, bits)
        tl.store(target + place + RANK * SHARE, own, mask=mask, cache_modifier=".wt")
    tl.debug_barrier()  # the compiler moves no store of these behind what waits
    h = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(RANKS):
        share = own
        if source != RANK:
            share = _share(box + place + source * SHARE, mask, tries, EMPTY)
            tl.store(box + before + source * SHARE, tl.full([BLOCK], EMPTY, bits), mask=mask)
        total += share.to(x.dtype.element_ty, bitcast=True).to(tl.float32)
    tl.store(turns + row, (turn + 1) % PLACES)
    add_and_norm(
        x,
        h,
        total,
        of_post,
        of_norm,
        out,
        scales,
        unit,
        eps,
        row,
        columns,
        mask,
        N,
        True,
        HAS_POST,
        NORM,
        FORM,
    )


@kernel(do_not_specialize=["size", "tries"])
def _stack_kernel(
    x, out, size, box, boxes, tags, tries,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    number = tl.program_id(0)
    at = number * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tag = tl.load(tags + number) + 1
    place = (tag & 1) * RANKS * BLOCKS * BLOCK + at
    own = tl.load(x + at, mask=mask, other=0)
    for other in tl.static_range(1, RANKS):
        target = _box_of(boxes + (RANK + other) % RANKS, tl.int64)
        word = (tag.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
        tl.store(target + place + RANK * BLOCKS * BLOCK, word, cache_modifier=".wt")
    tl.debug_barrier()
    for source in tl.static_range(RANKS):
        values = own
        if source != RANK:
            values = _taken(box + place + source * BLOCKS * BLOCK, tag, tries)
        tl.store(out + source * size + at, values, mask=mask)
    tl.store(tags + number, tag)


class Exchange:
    """The boxes of all ranks as one of them sees them, for rows of one size."""

    def __init__(self, boxes: Boxes, rank: int, ranks: int, size: int, dtype: torch.dtype) -> None:
        """``boxes`` are of :meth:`bytes_for`; ``size`` is a row's. Before the first sum of any rank all have called
        :meth:`empty`."""
        self._boxes, self._rank, self.size, self._width = boxes, rank, ranks, size
        self._bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._empty = torch.iinfo(self._bits).min  # -0.0
        device, sums = boxes.own.device, self._sums_bytes(ranks, size, dtype)
        self._turns = torch.zeros(most_rows(ranks), dtype=torch.int32, device=device)
        self._box = boxes.own[:sums].view(self._bits)
        self._tags = torch.zeros(STACK_BLOCKS, dtype=torch.int32, device=device)
        self._stacks = boxes.own[sums:].view(torch.int64)
        self._stack_addresses = boxes.addresses + sums
        self.rows = most_rows(ranks)
        """Most of a sum that is made here: 0 = none are."""
        self.tries = 0
        self._beyond: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def bytes_for(ranks: int, size: int, dtype: torch.dtype) -> int:
        return Exchange._sums_bytes(ranks, size, dtype) + 2 * ranks * STACK_BLOCKS * STACK_BLOCK * WORD

    @staticmethod
    def _sums_bytes(ranks: int, size: int, dtype: torch.dtype) -> int:
        return cdiv(PLACES.value * ranks * most_rows(ranks) * size * dtype.itemsize, ALIGNMENT) * ALIGNMENT

    def empty(self) -> None:
        """Nothing is there in the own box."""
        self._box.fill_(self._empty)

    @classmethod
    def between(cls, group: Group, size: int, dtype: torch.dtype) -> Exchange | None:
        """None if these ranks cannot write to each other's memory, or what they read there is wrong."""
        boxes = group.boxes(cls.bytes_for(group.size, size, dtype))
        if boxes is None:
            return None
        exchange, device = cls(boxes, group.rank, group.size, size, dtype), boxes.own.device
        exchange._beyond = group.stack

        def all_say(yes: bool) -> bool:
            return bool(group.stack(torch.tensor([yes], dtype=torch.int32, device=device)).all())

        exchange.empty()
        all_say(True)  # a barrier
        # First compiled, so that no rank waits for another one's compiler while it is tried out.
        if not all_say(exchange.compiles(dtype)) or not all_say(exchange.works(dtype)):
            return None
        return exchange

    def compiles(self, dtype: torch.dtype) -> bool:
        """Whether this device has room for the kernels; what they say here does not count."""
        row = torch.zeros(1, self._width, dtype=dtype, device=self._boxes.own.device)
        self.tries = 1
        try:
            self.add_norm(row, row.clone(), None, None, 1e-5)
            self.stack(row.view(torch.int32)[0, :1])
        except (OutOfResources, CompilationError):
            return False
        return True

    def works(self, dtype: torch.dtype) -> bool:
        """Whether a few sums come out right; every rank calls it. Gives up if the others' shares do not come."""
        device, right = self._boxes.own.device, True
        values = torch.arange(self._width, device=device) % 8
        self.tries = TRIES
        for rows in (
            1,
            self.rows,
            3,
            1,
            2,
            1,
        ):  # all places, and rows that have exchanged more often than others
            x = torch.ones(rows, self._width, dtype=dtype, device=device)
            share = (values * (self._rank + 1) + torch.arange(rows, device=device)[:, None]).to(dtype)
            self.add_norm(x, share, None, None, 1e-5)
            ranks = self.size * (self.size + 1) // 2
            expected = values * ranks + self.size * torch.arange(rows, device=device)[:, None] + 1
            right = right and torch.equal(x, expected.to(dtype))
            numbers = torch.arange(rows * STACK_BLOCK // 2, dtype=torch.int32, device=device)[
                : 4 * STACK_BLOCK
            ]
            stacked = self.stack(numbers + self._rank)
            right = right and all(torch.equal(each, numbers + rank) for rank, each in enumerate(stacked))
        self.tries = 0
        return right

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        form: Form = Form.PLAIN,
        in_scale: torch.Tensor | None = None,
    ) -> Activation:
        """As ``norm.add_norm`` of the sum of all ranks' ``delta``, for up to :attr:`rows` rows.

        Every rank calls it, with as many rows.
        """
        rows, size = x.shape
        out, scales = new_output(rows, size, form, x)
        block = next_power_of_2(size)
        parts, step = parts_of(delta)
        _exchange_kernel[(rows,)](
            x, delta, step, x if post is None else post, x if weight is None else weight,
            out, scales, out if in_scale is None else in_scale, eps,
            self._box, self._boxes.addresses, self._turns, self.tries,
            size, block, parts, post is not None, weight is not None, int(form), self._empty, len(self._turns),
            self._rank, self.size, num_warps=warps_of(block, parts), **LAUNCH,
        )  # fmt: skip
        return Activation(out, scales)

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """As ``Group.stack``, which is asked for what is large; ``x`` has numbers of 4 bytes."""
        count = x.numel()
        if count > STACK_BLOCKS * STACK_BLOCK and self._beyond is not None:
            return self._beyond(x)
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        _stack_kernel[(cdiv(count, STACK_BLOCK),)](
            x.view(torch.int32), out.view(torch.int32), count, self._stacks,
            self._stack_addresses, self._tags, self.tries,
            STACK_BLOCK, STACK_BLOCKS, self._rank, self.size, **LAUNCH,
        )  # fmt: skip
        return out
