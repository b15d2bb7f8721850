"""The source model in Transformers: what calibration and the accuracy gate run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig

from flightline.torch_engine.model.config_json import transformers_class

BATCH = 16


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Model in evaluation mode and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    auto_class: Any = getattr(transformers, transformers_class(folder))
    model = auto_class.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    """Token ids without added specials (a rendered chat carries its own), at most ``limit``."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][:limit]


@torch.inference_mode()
def greedy(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The model's own most likely continuation of each prompt, ended by an end token or after ``new_tokens``.

    Prompts are batched with those of like length, padded on the left.
    """
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    pad = ends[0] if ends else 0
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad
    )
    model.generation_config = config  # the checkpoint's own may sample or penalise
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        width = max(len(prompts[index]) for index in group)
        padding = [width - len(prompts[index]) for index in group]
        ids = [[pad] * fill + prompts[index] for fill, index in zip(padding, group, strict=True)]
        mask = [[0] * fill + [1] * (width - fill) for fill in padding]
        output = model.generate(
            torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device)
        )
        for index, row in zip(group, output[:, width:].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            answers[index] = row[:end]
    model.generation_config = GenerationConfig(eos_token_id=ends or None)
    return answers
