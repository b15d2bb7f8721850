"""The names of ``tensorrt_llm`` that the facts know."""

from __future__ import annotations

import os

from . import llmapi
from .llm import LLM
from .sampling import SamplingParams

__all__ = ["LLM", "SamplingParams", "llmapi"]
__version__ = os.environ.get("TRTLLM_DOUBLE_VERSION", "1.2.1")
