"""Serving on TensorRT-LLM: its LLM API behind our engine interface, and what must hold before it starts."""
