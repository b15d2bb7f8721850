"""Our engine, called like a Transformers model: what the accuracy gate runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.choice import choose
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.kernel_interface import Kernels
from flightline.torch_engine.model.weights import Checkpoint


class EngineModel:
    """Prompts of up to ``max_tokens`` through the engine folder's model and kernels, one at a time."""

    def __init__(self, engine_dir: Path, max_tokens: int) -> None:
        config = EngineConfig.load(engine_dir, tensor_parallel_size=1)  # also what several GPUs will share
        checkpoint = Checkpoint(config.model_dir, load_spec(config.model_dir))
        self.device = torch.device(config.device)
        blocks = -(-max_tokens // config.block_size)
        with torch.inference_mode():
            kernels: Kernels[Any, Any, Any] = choose(config)
            self._model = Model(checkpoint, kernels, max(config.max_seq_len, max_tokens))
            self._caches = self._model.new_caches(blocks, config.block_size)
        # As in a server that has run for a while; in order, whatever ignores the table would be right.
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(self.device)
        self._steps = kernels.sequence_steps(checkpoint.spec, table, config.block_size)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """Logits of the last ``logits_to_keep`` tokens of ``ids [1, T]``, of all by default: [1, kept, vocab]."""
        return SimpleNamespace(logits=self._run(self._steps.prompt(ids[0], logits_to_keep))[None])

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Logits ``[T - first, vocab]`` of the tokens of ``ids [T]`` from ``first`` on, each in a step of its own.

        As generated ones are computed: by the kernels for single tokens, over the KV cache that a prefill of the
        tokens before ``first`` and these steps have written.
        """
        self._run(self._steps.prompt(ids[:first], 1))
        return torch.cat([self._run(self._steps.token(ids, position)) for position in range(first, len(ids))])

    def _run(self, step: Any) -> torch.Tensor:
        return self._model.forward(step, self._caches)
