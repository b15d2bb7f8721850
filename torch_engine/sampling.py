"""Chooses the next token of each sequence from its logits.

Most requests are greedy: one argmax for all. The others are sampled from their ``CANDIDATES`` most
likely tokens, found by one top-k for the whole batch; walking a 49k vocabulary per request would cost as
much as the model's step on a CPU. Where the candidates cannot hold the asked distribution (top-k above
their number, nucleus not reached, no limit at all), the whole row is used: never an approximation.

Every request draws from its own random numbers, so that its output does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from torch_engine.request import SamplingParams
from torch_engine.sequence import Sequence

CANDIDATES = 256


class Sampled(NamedTuple):
    token_id: int
    log_prob: float
    """Under the model's own distribution (no temperature, no truncation); 0.0 if not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens under that distribution with their log-probabilities, as many as asked for."""


@torch.inference_mode()
def sample(
    logits: torch.Tensor, sequences: list[Sequence], argmax: Callable[[torch.Tensor], torch.Tensor]
) -> list[Sampled]:
    """One token for each row of ``logits`` [rows, vocab] float32, which is changed in place."""
    if all(sequence.samples_on_device for sequence in sequences):
        _leave_ends_out(logits, sequences)
        return [Sampled(token, 0.0) for token in argmax(logits).tolist()]
    normalisers = _normalisers(logits, sequences)
    raw = logits
    if normalisers is not None and any(_changes_logits(sequence) for sequence in sequences):
        raw = logits.clone()
    for row, sequence in enumerate(sequences):
        if _changes_logits(sequence):
            _penalise(logits[row], sequence)
    tokens = argmax(logits).tolist()
    random = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    if random:
        rows = logits[random] if len(random) < len(sequences) else logits
        for row, token in zip(random, _draw(rows, [sequences[row] for row in random]), strict=True):
            tokens[row] = token
    if normalisers is None:
        return [Sampled(token, 0.0) for token in tokens]
    chosen = raw.gather(1, torch.tensor(tokens, device=raw.device)[:, None])[:, 0]
    return [
        Sampled(token, log_prob)
        for token, log_prob in zip(tokens, (chosen - normalisers).tolist(), strict=True)
    ]


def _leave_ends_out(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Where an output is too short to end, in one operation: all may be, and their rows one by one take a while."""
    pairs = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.request.min_tokens and sequence.must_go_on
        for token in sequence.end_ids
        if 0 <= token < logits.shape[1]
    ]
    if pairs:
        rows, columns = zip(*pairs, strict=True)
        logits[list(rows), list(columns)] = float("-inf")


def _normalisers(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor | None:
    if not any(sequence.request.return_log_probs for sequence in sequences):
        return None
    return logits.logsumexp(-1)


def _changes_logits(sequence: Sequence) -> bool:
    request, params = sequence.request, sequence.request.sampling
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(request.bad_ids)
        or sequence.num_generated < request.min_tokens
    )


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """Applies penalties, bad words and the minimum length to one row [vocab], touching only the tokens concerned.

    Repetition: divide positive and multiply negative logits (Keskar et al. 2019) of all tokens seen.
    Presence and frequency: subtract, of tokens generated (OpenAI's definition).
    """
    request, params = sequence.request, sequence.request.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.counts and (params.presence_penalty or params.frequency_penalty):
        generated = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), device=row.device, dtype=row.dtype)
        row[generated] -= params.presence_penalty + params.frequency_penalty * counts
    banned = [word[-1] for word in request.bad_ids if _ends_with(sequence.tokens, word[:-1])]
    if sequence.num_generated < request.min_tokens:
        banned += sequence.end_ids
    banned = [token for token in banned if 0 <= token < row.shape[0]]
    if banned:
        row[banned] = float("-inf")


def _ends_with(tokens: list[int], ending: tuple[int, ...]) -> bool:
    return not ending or tuple(tokens[-len(ending) :]) == ending


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Samples each row of ``logits`` [rows, vocab] by its request's temperature, top-k and top-p."""
    temperatures = torch.tensor([s.request.sampling.temperature for s in sequences], device=logits.device)
    scaled = logits / temperatures[:, None]
    total = scaled.logsumexp(-1).cpu().numpy()
    candidates = scaled.topk(min(CANDIDATES, scaled.shape[-1]), dim=-1)
    values, indices = candidates.values.double().cpu().numpy(), candidates.indices.cpu().numpy()
    tokens = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.sampling
        point = sequence.rng.random()
        if _holds(params, values[row], total[row]):
            choice = _truncated(params, values[row], total[row], point)
            tokens.append(int(indices[row, choice]))
        else:
            order = scaled[row].argsort(descending=True)
            everything = scaled[row][order].double().cpu().numpy()
            tokens.append(int(order[_truncated(params, everything, total[row], point)]))
    return tokens


def _holds(params: SamplingParams, values: np.ndarray, total: float) -> bool:
    """Whether the sorted candidates contain everything that top-k and top-p leave over."""
    if params.top_k:
        return params.top_k <= len(values)
    return params.top_p is not None and np.exp(values - total).sum() >= params.top_p


def _truncated(params: SamplingParams, values: np.ndarray, total: float, point: float) -> int:
    """Index into ``values`` (sorted, descending) at the quantile ``point`` of what top-k, then top-p, leave.

    Top-p keeps the smallest set that reaches the mass; it is taken of what top-k left over, renormalised.
    """
    if params.top_k:
        values = values[: params.top_k]
        total = np.logaddexp.reduce(values)
    mass = np.cumsum(np.exp(values - total))
    if params.top_p and params.top_p < 1.0:
        mass = mass[: int(np.searchsorted(mass, params.top_p)) + 1]
    return min(int(np.searchsorted(mass, point * mass[-1], side="right")), len(mass) - 1)
