"""Configuration classes of the LLM API."""

from __future__ import annotations

from ..surface import Strict


class KvCacheConfig(Strict):
    table = "kv_cache_config"


class CudaGraphConfig(Strict):
    table = "cuda_graph_config"
