"""Names of Triton's lower language (Gluon) that differ between its releases: 3.6 and 3.8 are known."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Waits for all threads of a program."""
