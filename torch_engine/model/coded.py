"""A linear's weight as its checkpoint stores it: codes with scales, whatever format they came in.

Every form has its scales along the inputs, so that rows may be taken, moved and stacked without touching a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers of one bit of sign, two of exponent and one of mantissa."""


@dataclass(frozen=True)
class Coded:
    """N outputs, K inputs, in G groups of ``group`` neighbouring inputs, the last of which may be short."""

    codes: torch.Tensor
    """[N, K]: e4m3, or uint8 of ``bits``."""
    scales: torch.Tensor
    """[N, G]: a weight is its code times its scale, but for ``offsets``."""
    group: int
    offsets: torch.Tensor | None = None
    """[N, G]: uint8, then a weight is (code - offset) * scale; or floating point, then it is code * scale + offset."""
    bits: int = 8
    order: torch.Tensor | None = None
    """[K] int64: which input each column of ``codes`` multiplies; None = in order."""
    input_scale: torch.Tensor | None = None
    """Scalar float32: what activations are divided by before they are rounded to e4m3; None = not known beforehand."""
    e2m1: bool = False
    """Codes of 4 bits are floating-point numbers (:data:`E2M1`)."""

    def rows(self, index: torch.Tensor | slice) -> Coded:
        """The outputs of ``index``, in its order."""
        return self._each(lambda tensor: _bytes(tensor)[index].view(tensor.dtype))

    def columns(self, begin: int, end: int) -> Coded | None:
        """The inputs from ``begin`` to before ``end``; None if that would cut a group."""
        inputs = self.codes.shape[1]
        if self.scales.shape[1] == 1 and self.order is None:
            return replace(self, codes=self.codes[:, begin:end].contiguous(), group=end - begin)
        if self.order is not None or begin % self.group or (end % self.group and end != inputs):
            return None
        groups = slice(begin // self.group, -(-end // self.group))
        offsets = None if self.offsets is None else self.offsets[:, groups].contiguous()
        codes, scales = self.codes[:, begin:end].contiguous(), self.scales[:, groups].contiguous()
        return replace(self, codes=codes, scales=scales, offsets=offsets)

    def to(self, device: torch.device) -> Coded:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        moved = self._each(lambda tensor: tensor.to(device))
        return replace(moved, order=move(self.order), input_scale=move(self.input_scale))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Coded:
        offsets = None if self.offsets is None else change(self.offsets)
        return replace(self, codes=change(self.codes), scales=change(self.scales), offsets=offsets)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] itself, its inputs in order, computed in float32 and rounded once."""
        values = E2M1.to(self.codes.device)[self.codes.int()] if self.e2m1 else self.codes.float()
        if self.offsets is not None and not self.offsets.is_floating_point():
            values -= self._spread(self.offsets)
        values *= self._spread(self.scales)
        if self.offsets is not None and self.offsets.is_floating_point():
            values += self._spread(self.offsets)
        rounded = values.to(dtype)
        return rounded if self.order is None else rounded[:, self.order.argsort()]

    def minima(self) -> torch.Tensor:
        """[N, G] float32: what code 0 means."""
        if self.offsets is None:
            return torch.zeros(self.scales.shape)
        offsets = self.offsets.float()
        return offsets if self.offsets.is_floating_point() else -offsets * self.scales.float()

    def whole(self) -> Coded:
        """The same weight in whole codes, for kernels that know no others: twice an e2m1 number, plus 12."""
        if not self.e2m1:
            return self
        codes = (2 * E2M1 + 12).to(torch.uint8).to(self.codes.device)[self.codes.int()]
        zeros = torch.full(self.scales.shape, 12, dtype=torch.uint8, device=codes.device)
        return replace(self, codes=codes, scales=self.scales.float() / 2, offsets=zeros, bits=5, e2m1=False)

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        """[N, G] to [N, K], or to [N, 1] of a single group."""
        wide = groups.float()
        return wide if wide.shape[1] == 1 else wide.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

    def _unites(self) -> bool:
        return self.codes.dtype == torch.uint8 and self.order is None and not self.e2m1

    def _in_groups_of(self, group: int, bits: int) -> Coded:
        """The same weight in codes of more bits, with a minimum and a scale for ``group`` inputs, a part of its own."""
        times = self.group // group
        scales, minima = (each.float().repeat_interleave(times, 1) for each in (self.scales, self.minima()))
        return Coded(self.codes, scales, group, minima, bits)

    def _kind(self) -> tuple[object, ...]:
        offsets = None if self.offsets is None else self.offsets.dtype
        kept = self.codes.dtype, self.bits, self.group, self.scales.dtype, offsets
        return *kept, self.input_scale is None, self.e2m1

    @property
    def by_tensor(self) -> torch.Tensor | None:
        """The one scale of all weights, a scalar; None if they have several."""
        first = self.scales[0, 0]
        return first.float() if bool((self.scales == first).all()) else None


def stack(parts: list[Coded]) -> Coded | None:
    """Several weights of the same inputs above each other; None if they are not coded alike, and cannot be.

    The largest input scale holds for all: none of the values that they read is beyond it.
    """
    first = parts[0]
    if len({part._kind() for part in parts}) > 1 and all(part._unites() for part in parts):
        group, bits = math.gcd(*(part.group for part in parts)), max(5, *(part.bits for part in parts))
        parts = [part._in_groups_of(group, bits) for part in parts]
        first = parts[0]
    if any(part._kind() != first._kind() or not _same(part.order, first.order) for part in parts):
        return None
    inputs = [part.input_scale for part in parts if part.input_scale is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Coded(
        codes=_above([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        group=first.group,
        offsets=torch.cat(offsets) if offsets else None,
        bits=first.bits,
        order=first.order,
        input_scale=torch.stack(inputs).amax() if inputs else None,
        e2m1=first.e2m1,
    )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _above(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_bytes(part) for part in parts]).view(parts[0].dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """e4m3 as bytes: torch does not index or join it on every device."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
