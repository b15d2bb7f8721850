"""What is known of Triton's tensors where requests are passed on to it."""

from __future__ import annotations

import re
from pathlib import Path

from flightline.gateway.passage import WIDE

ROOT = Path(__file__).resolve().parents[2]
ENDPOINTS = ("ensemble", "hf_baseline", "llmapi", "tensorrt_llm", "tensorrt_llm_bls", "text_generation")


def test_what_may_be_wide_is_what_has_64_bits() -> None:
    """A tensor of 64 bits that is missing there would be refused; one of 32 bits would be cut by Triton 2.51."""
    inputs = ""
    for model in ENDPOINTS:
        config = (ROOT / "model_repository" / model / "config.pbtxt").read_text(encoding="utf-8")
        inputs += re.split(r"^output\b", config, maxsplit=1, flags=re.MULTILINE)[0]
    assert "output [" not in inputs
    assert set(re.findall(r'name: "(\w+)"\s+data_type: TYPE_U?INT64\b', inputs)) == WIDE
    assert "max_tokens" in inputs
