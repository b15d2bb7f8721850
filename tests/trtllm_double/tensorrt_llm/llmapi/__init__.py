"""Configuration classes of the LLM API."""

from __future__ import annotations

from ..surface import SURFACE, Strict


class KvCacheConfig(Strict):
    table = "kv_cache_config"


class CudaGraphConfig(Strict):
    table = "cuda_graph_config"


class GuidedDecodingParams(Strict):
    table = "guided_decoding_params"


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
