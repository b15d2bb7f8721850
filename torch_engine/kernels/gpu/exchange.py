"""A few rows' sums over the GPUs that share a model, in one kernel with the residual sum and the norm after them; and
what each rank has found, side by side.

Each rank has a box: memory that the others write to over NVLink (``Group.boxes``; no multicast). A kernel's program has
one row. It writes its rank's share of the row into the boxes of all others, waits for theirs in its own, and adds up
all shares in the order of ranks, so that every rank gets the same bits. Nobody asks anybody for anything: a row takes
one way over the link, not the way there and back.

The protocol:

* A word of 8 bytes is a tag and 4 bytes of the share. It is written and read at once, so the tag says that its 4 bytes
  are there: no fence, and no flag beside the data. A row is there when all its words have the tag.
* The tag counts the exchanges of a row, or of a block of what is put side by side. It lies in memory (``tags``), since
  a CUDA graph repeats its arguments. All ranks run the same kernels in the same order, so they count alike. It may
  wrap: a word left in a box is two exchanges old, and only words with exactly the tag count.
* A box has two halves, for even and odd tags. Who writes tag t + 2 has ended the kernel of t + 1, so all others had
  begun theirs of t + 1, and ended theirs of t: nobody still reads what is overwritten. No barrier is needed. That
  wants kernels on one stream, each of which waits for the end of the one before (``begin_kernel``).
* A row waits for the same row of the others only, and each rank starts its rows in their order: that ends, however few
  of them the device runs at once. If another rank never comes, it does not end; who watches the ranks ends the process
  (``parallel/ranks.py``). While the kernel is tried out (:meth:`Exchange.works`), it gives up.
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
    INTERPRETED,
    LAUNCH,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
)
from flightline.torch_engine.kernels.gpu.norm import add_and_norm, norm_weights
from flightline.torch_engine.parallel.group import Boxes, Group

MOST_ROWS = 64
"""Of an exchange: beyond, two bytes more on the link for each two of data cost more than a barrier saves."""
STACK_BLOCK, STACK_BLOCKS = 1024, 16
"""Numbers of 4 bytes, as of the likeliest tokens of 128 rows: few enough that one way over the link is the shortest."""
WORD = 8
TRIES = 1 << 22
"""How often a row is looked for while the kernel is tried out: some seconds."""

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _packed(values, like, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Float32 [BLOCK] rounded to the type that ``like`` points to, as int32: of 16 bits two neighbours in each."""
    rounded = values.to(like.dtype.element_ty)
    if PAIRS:
        low, high = tl.split(tl.reshape(rounded.to(tl.int16, bitcast=True), (BLOCK // 2, 2)))
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    else:
        return rounded.to(tl.int32, bitcast=True)


@triton.jit
def _unpacked(payload, like, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """What :func:`_packed` has packed, in float32."""
    if PAIRS:
        pairs = tl.reshape(tl.join(payload.to(tl.int16), (payload >> 16).to(tl.int16)), (BLOCK,))
        return pairs.to(like.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        return payload.to(like.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _put(target, tag, payload, mask):
    """Writes words to another rank's box, each at once."""
    word = (tag.to(tl.int64) << 32) | (payload.to(tl.int64) & 0xFFFFFFFF)
    if _INTERPRETED:
        tl.store(target, word, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l,r", [target.to(tl.int64), word, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _late(word, tag, mask):
    return tl.max(tl.where(mask & ((word >> 32).to(tl.int32) != tag), 1, 0), 0)


@triton.jit
def _taken(source, tag, mask, tries):
    """The 4 bytes of each word of the own box, when all of them have the tag; 0 ``tries`` are as many as it takes."""
    word = tl.load(source, mask=mask, other=0, volatile=True)
    left = tries - 1
    while (_late(word, tag, mask) != 0) & (left != 0):
        word = tl.load(source, mask=mask, other=0, volatile=True)
        left -= 1
    return word.to(tl.int32)


@kernel(do_not_specialize=["step", "tries"])
def _exchange_kernel(
    x, delta, step, post, weight, out, scales, in_scale, eps, box, boxes, tags, tries,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_POST: tl.constexpr, NORM: tl.constexpr,
    FORM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    of_post, of_norm = norm_weights(post, weight, columns, mask, HAS_POST, NORM)
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    tag = tl.load(tags + row) + 1
    WORDS: tl.constexpr = N // 2 if PAIRS else N
    words = tl.arange(0, BLOCK // 2 if PAIRS else BLOCK)
    inside = words < WORDS
    place = (tag & 1).to(tl.int64) * RANKS * ROWS * WORDS + row * WORDS + words
    own = _packed(sum_parts(delta + row * N + columns, step, mask, PARTS), x, BLOCK, PAIRS)
    for other in tl.static_range(1, RANKS):  # not all to the same one first
        target = tl.load(boxes + (RANK + other) % RANKS).to(tl.pointer_type(tl.int64))
        _put(target + place + RANK * ROWS * WORDS, tag, own, inside)
    h = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(RANKS):
        if source == RANK:
            total += _unpacked(own, x, BLOCK, PAIRS)
        else:
            share = _taken(box + place + source * ROWS * WORDS, tag, inside, tries)
            total += _unpacked(share, x, BLOCK, PAIRS)
    tl.store(tags + row, tag)
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
        target = tl.load(boxes + (RANK + other) % RANKS).to(tl.pointer_type(tl.int64))
        _put(target + place + RANK * BLOCKS * BLOCK, tag, own, mask)
    for source in tl.static_range(RANKS):
        values = own
        if source != RANK:
            values = _taken(box + place + source * BLOCKS * BLOCK, tag, mask, tries)
        tl.store(out + source * size + at, values, mask=mask)
    tl.store(tags + number, tag)


class Exchange:
    """The boxes of all ranks as one of them sees them, for rows of one size."""

    def __init__(self, boxes: Boxes, rank: int, ranks: int, size: int, dtype: torch.dtype) -> None:
        """``boxes`` are of :meth:`bytes_for`; ``size`` is a row's."""
        self._boxes, self._rank, self.size, self._width = boxes, rank, ranks, size
        self._pairs = dtype.itemsize == 2
        # Of the sums' rows, and of the blocks of stacks, whose boxes come after theirs.
        self._tags = torch.zeros(MOST_ROWS + STACK_BLOCKS, dtype=torch.int32, device=boxes.own.device)
        self._box = boxes.own.view(torch.int64)
        self._sums_end = len(self._box) - self._stack_words(ranks)
        self._stack_addresses = boxes.addresses + self._sums_end * WORD
        self.rows = MOST_ROWS
        """Most of a sum that is made here: 0 = none are."""
        self.tries = 0
        self._beyond: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def bytes_for(ranks: int, size: int, dtype: torch.dtype) -> int:
        words = 2 * ranks * MOST_ROWS * (size // 2 if dtype.itemsize == 2 else size)
        return (words + Exchange._stack_words(ranks)) * WORD

    @staticmethod
    def _stack_words(ranks: int) -> int:
        return 2 * ranks * STACK_BLOCKS * STACK_BLOCK

    @classmethod
    def between(cls, group: Group, size: int, dtype: torch.dtype) -> Exchange | None:
        """None if these ranks cannot write to each other's memory, or what they read there is wrong."""
        boxes = group.boxes(cls.bytes_for(group.size, size, dtype)) if size % 2 == 0 else None
        if boxes is None:
            return None
        exchange, device = cls(boxes, group.rank, group.size, size, dtype), boxes.own.device
        exchange._beyond = group.stack

        def all_say(yes: bool) -> bool:
            return bool(group.stack(torch.tensor([yes], dtype=torch.int32, device=device)).all())

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
        for rows in (1, MOST_ROWS, 3, 1):  # both halves, and rows that have exchanged more often than others
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
            self._box, self._boxes.addresses, self._tags, self.tries,
            size, block, parts, post is not None, weight is not None, int(form), self._pairs, MOST_ROWS,
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
            x.view(torch.int32), out.view(torch.int32), count, self._box[self._sums_end :],
            self._stack_addresses, self._tags[MOST_ROWS:], self.tries,
            STACK_BLOCK, STACK_BLOCKS, self._rank, self.size, **LAUNCH,
        )  # fmt: skip
        return out
