"""Our engine, called like a Transformers model: what the accuracy gate runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torch_engine import kernels
from torch_engine.config import EngineConfig
from torch_engine.families import load_spec
from torch_engine.model import Model
from torch_engine.steps import PrefillChunk, StepInput
from torch_engine.weights import Checkpoint


class EngineModel:
    """Prompts of up to ``max_tokens`` through the engine folder's model and kernels, one at a time."""

    def __init__(self, engine_dir: Path, max_tokens: int) -> None:
        config = EngineConfig.load(engine_dir)
        checkpoint = Checkpoint(config.model_dir, load_spec(config.model_dir))
        self.device = torch.device(config.device)
        self._block_size = config.block_size
        blocks = -(-max_tokens // config.block_size)
        with torch.inference_mode():
            self._model = Model(checkpoint, kernels.choose(config), max(config.max_seq_len, max_tokens))
            self._caches = self._model.new_caches(blocks, config.block_size)
        self._table = torch.arange(blocks, device=self.device)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """Logits of the last ``logits_to_keep`` tokens of ``ids [1, T]``, of all by default: [1, kept, vocab]."""
        run = self._on_gpu if self._model.kernels.name == "cuda" else self._on_cpu
        return SimpleNamespace(logits=run(ids[0], logits_to_keep)[None])

    def _on_cpu(self, ids: torch.Tensor, kept: int) -> torch.Tensor:
        count = ids.shape[0]
        every = torch.arange(count)
        step = StepInput(
            token_ids=ids,
            positions=every,
            slots=every,
            decode_blocks=torch.zeros(0, 0, dtype=torch.int64),
            decode_lengths=torch.zeros(0, dtype=torch.int64),
            prefills=[PrefillChunk(0, count, count, self._table[: -(-count // self._block_size)])],
            logit_rows=every[-kept:],
        )
        return self._model.forward(step, self._caches)

    def _on_gpu(self, ids: torch.Tensor, kept: int) -> torch.Tensor:
        from torch_engine.cuda_runner import one_prompt  # needs Triton's language

        step = one_prompt(ids, kept, self._table, self._model)
        logits = self._model.raw_logits(step, self._caches).float()
        scales = self._model.lm_head.column_scales  # type: ignore[attr-defined]
        return self._model.finished(logits if scales is None else logits * scales)
