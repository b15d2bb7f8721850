"""Configuration classes of the LLM API."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ..surface import SURFACE, Strict


class KvCacheConfig(Strict):
    table = "kv_cache_config"


class CudaGraphConfig(Strict):
    table = "cuda_graph_config"


class GuidedDecodingParams(Strict):
    table = "guided_decoding_params"


class KvCacheRetentionConfig:
    """Bindings of the C++ class, with its checks."""

    @dataclass(frozen=True)
    class TokenRangeRetentionConfig:
        token_start: int
        token_end: int | None = None
        priority: int = 35
        duration_ms: datetime.timedelta | None = None

        def __post_init__(self) -> None:
            if not 0 <= self.priority <= 100:
                raise RuntimeError("Retention priority must be within [0, 100]")

    def __init__(
        self,
        token_range_retention_configs: list[TokenRangeRetentionConfig],
        decode_retention_priority: int = 35,
        decode_duration_ms: datetime.timedelta | None = None,
    ) -> None:
        for each in token_range_retention_configs:
            if each.token_end is not None and each.token_end < each.token_start:
                raise ValueError("a token range ends before it starts")
        self.token_range_retention_configs = token_range_retention_configs
        self.decode_retention_priority = decode_retention_priority
        self.decode_duration_ms = decode_duration_ms


class llm_args:
    class TorchLlmArgs:
        """Arguments of ``LLM`` as pydantic lists them."""

        model_fields = dict.fromkeys(
            [
                *SURFACE["llm_arguments"]["common"],
                *SURFACE["llm_arguments"]["pytorch"],
                *SURFACE["llm_arguments"]["pytorch_only_in"],
            ]
        )
