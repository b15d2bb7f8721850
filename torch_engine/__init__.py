"""Flightline's own inference engine: paged KV cache and in-flight batching on plain PyTorch.

Importing this package does not import torch, so that Triton's stubs, which only talk to the engine
process (``process/client.py``) or decode tokens (``text/stream.py``), stay small.
"""
