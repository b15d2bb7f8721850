"""The one exception of the build."""

from __future__ import annotations


class BuildError(Exception):
    """The build cannot go on; the message is one line that names the field, the value and the remedy."""


class PrecisionRefused(BuildError):
    """A precision cannot be used: it failed the accuracy gate, or its kernels cannot be compiled."""


class GateRefused(PrecisionRefused):
    """A precision failed the accuracy gate; ``why`` are its figures."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why
