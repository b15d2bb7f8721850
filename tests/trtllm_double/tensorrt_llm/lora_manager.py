"""Where upstream keeps the settings of its adapters."""

from __future__ import annotations

from .surface import Strict


class LoraConfig(Strict):
    table = "lora_config"
