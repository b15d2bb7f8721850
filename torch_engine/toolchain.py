"""The C++ compiler for the CPU kernels. No torch: the build's plan asks before it imports anything heavy."""

from __future__ import annotations

import os
import shutil


def compiler() -> str | None:
    """Path of ``$CXX``, else g++, else clang++; None if there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
