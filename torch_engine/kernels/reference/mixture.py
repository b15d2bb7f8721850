"""A mixture of experts in plain PyTorch.

Shapes: T rows, N hidden size, E experts, C of them chosen for each row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flightline.torch_engine.model.mixture import CLAMPED_SLOPE, MixtureSpec

Linear = Callable[[torch.Tensor], torch.Tensor]


def route(
    logits: torch.Tensor, mixture: MixtureSpec, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the router's logits [T, E] float32 to the chosen experts and their weights, each [T, C], best first.

    ``correction`` [E] float32 is added for the choice alone.
    """
    scores = logits.softmax(-1) if mixture.score == "softmax" else logits.sigmoid()
    choice = scores if correction is None else scores + correction
    if mixture.groups > 1:
        grouped = choice.view(len(choice), mixture.groups, -1)
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = _best(worth, mixture.kept_groups)
        dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(dropped[..., None], -torch.inf).view_as(choice)
    chosen = _best(choice, mixture.chosen)
    weights = scores.gather(1, chosen)
    if mixture.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * mixture.scale


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Of equal ones the first, which ``topk`` does not promise."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def clamped_gate(gate_up: torch.Tensor, clamp: float) -> torch.Tensor:
    """[T, 2 I] -> [T, I], as ``MixtureSpec.clamp`` says."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)


class RoutedMlp:
    """Runs the rows of each expert that was hit; made of linears, so that it takes whatever those take."""

    def __init__(
        self,
        mixture: MixtureSpec,
        router: Linear,
        correction: torch.Tensor | None,
        experts: list[Linear],
        shared: Linear | None,
        shared_gate: torch.Tensor | None,
    ) -> None:
        """``router`` gives logits [T, E] in float32; an expert is a whole MLP; ``shared_gate`` [1, N]."""
        self.mixture, self.router, self.correction = mixture, router, correction
        self.experts, self.shared, self.shared_gate = experts, shared, shared_gate

    def __call__(self, x: torch.Tensor, step: object) -> torch.Tensor:
        chosen, weights = route(self.router(x), self.mixture, self.correction)
        out = torch.zeros_like(x, dtype=torch.float32)
        for number in chosen.unique().tolist():
            rows, places = torch.where(chosen == number)
            done = self.experts[number](x[rows]).float()
            out.index_add_(0, rows, done * weights[rows, places, None])
        if self.shared is not None:
            shared = self.shared(x).float()
            if self.shared_gate is not None:
                shared = shared * torch.sigmoid(x.float() @ self.shared_gate.t().float())
            out += shared
        return out.to(x.dtype)
