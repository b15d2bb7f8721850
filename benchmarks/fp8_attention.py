"""What each part of attention in FP8 costs in accuracy: ``python3 benchmarks/fp8_attention.py CHECKPOINT``.

Reads pages of ``docs/`` with a Llama-like checkpoint, on a CPU and in float32, four times: with attention as it is;
with keys and values in e4m3 (``KV_CACHE_DTYPE=fp8``); with queries in e4m3 too, a scale for each head of a token, and
weights in fp16; and with weights in e4m3 as ``torch_engine/kernels/gpu/gathered.py`` has them: tile after tile of 64
keys, 2 ** 8 times as large beside the largest so far. Prints perplexity, how often the likeliest token is that of the
first reading, and the divergence of the distributions from it (nats a token). Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
KINDS = ("as it is", "keys and values", "scores", "scores and weights")
TILE, LIFT = 64, 2.0**8


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def tiled(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``scores`` [..., T, T], masked; ``values`` [..., T, D]."""
    out, total = torch.zeros(()), torch.zeros(())
    top = torch.full((*scores.shape[:-1], 1), -1e30)
    for begin in range(0, scores.shape[-1], TILE):
        part = scores[..., begin : begin + TILE]
        higher = torch.maximum(top, part.amax(-1, keepdim=True))
        fade, weights = (top - higher).exp(), (part - higher).exp() * LIFT
        total = total * fade + weights.sum(-1, keepdim=True)
        out, top = out * fade + e4m3(weights) @ values[..., begin : begin + TILE, :], higher
    return out / total


class Attention:
    """In Transformers' place for one; ``kind`` is one of ``KINDS``."""

    kind = KINDS[0]

    def __call__(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """q [B, H, T, D], k and v [B, V, T, D] -> [B, T, H, D]."""
        level = KINDS.index(self.kind)
        if level > 0:
            k, v = e4m3(k), e4m3(v)
        if level > 1:
            unit = q.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
            q = e4m3(q / unit) * unit
        groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) * scaling
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf)
        if level == 3:
            out = tiled(scores, v)
        else:
            weights = scores.softmax(-1)
            out = (weights.half().float() if level == 2 else weights) @ v
        return out.transpose(1, 2).contiguous(), None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of a text (%(default)s)")
    parser.add_argument("--texts", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(2)
    attention = Attention()
    ALL_ATTENTION_FUNCTIONS["own"] = attention
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    model.config._attn_implementation = "own"
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    text = "\n\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    ids = torch.tensor(tokenizer(text)["input_ids"][: options.tokens * options.texts]).view(options.texts, -1)
    exact: list[torch.Tensor] = []
    print("| in FP8 | perplexity | likeliest token the same | divergence |\n|---|--:|--:|--:|")
    for attention.kind in KINDS:
        surprise, same, apart = 0.0, 0.0, 0.0
        for number, part in enumerate(ids):
            with torch.no_grad():
                found = model(part[None]).logits[0].float().log_softmax(-1)
            if attention.kind == KINDS[0]:
                exact.append(found)
            known = exact[number]
            surprise -= float(found[:-1].gather(1, part[1:, None]).mean()) / len(ids)
            same += float((found.argmax(-1) == known.argmax(-1)).float().mean()) / len(ids)
            apart += float((known.exp() * (known - found)).sum(-1).mean()) / len(ids)
        print(f"| {attention.kind} | {math.exp(surprise):.3f} | {same:.4f} | {apart:.5f} |", flush=True)


if __name__ == "__main__":
    main()
