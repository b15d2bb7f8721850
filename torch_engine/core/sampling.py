"""Chooses the next token of each sequence from its logits.

For each row, in this order: log-probabilities are taken of the logits as the model gives them; then logit bias,
repetition penalty (Keskar et al. 2019: positive logits divided, negative ones multiplied, of all tokens of prompt and
output), presence and frequency penalty (subtracted, of the output's tokens: OpenAI's definition), bad words, ends
that come too early and what a grammar forbids (-inf); divided by the temperature; top-k; top-p of what top-k left;
min-p; and one token is drawn of those that remain. Tokens stand in the order (logit descending, id ascending), and
what is kept is exact: the first k; those before which there is less mass than ``top_p``, at least one; those of at
least ``min_p`` times the likeliest's probability. NaN counts as -inf and +inf as the largest number; a row without a
finite logit is an error of that row alone.

A draw is Gumbel-max in two levels, exact by the same argument twice: of parts of ``PART`` tokens the one whose
log-sum-exp plus noise is highest, and in it the token whose logit plus noise is. The noise is a function of the
request's seed, the token's position in the sequence, and the part's or token's number (Philox-4x32-10: Salmon et al.
2011): an answer depends neither on its neighbours nor on how it was computed, and each device draws the same. A guess
(``core/speculation.py``) is right if it is what would have been drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.sequence import Sequence

PART = 1024
"""Neighbouring token ids that are drawn from together, whatever the device and the batch."""
NO_FINITE_LOGIT = "the model gave no finite logit"


class Sampled(NamedTuple):
    token_id: int
    """-1: none could be chosen, and ``error`` says why."""
    log_prob: float = 0.0
    """Under the model's own distribution (no temperature, no truncation); 0.0 if not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens under that distribution with their log-probabilities, as many as asked for."""
    error: str = NO_FINITE_LOGIT


class Sampler(Protocol):
    """What choosing tokens asks of a device."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Most likely token of each row: [rows, vocab] float32 -> [rows] int64; -1 if none is above -inf."""

    def sample(
        self, logits: torch.Tensor, states: list[SamplingState], positions: list[int]
    ) -> list[Sampled]:
        """A token for each row of ``logits`` [rows, vocab] float32, which may be changed; ``positions`` is where it
        will stand."""


class Row(NamedTuple):
    """One token to choose: what follows the sequence's tokens and these guesses."""

    sequence: Sequence
    guesses: tuple[int, ...] = ()


def rows_of(chunks: list[Chunk]) -> list[Row]:
    """Rows of a step's logits: one for each chunk that samples, and one more for each of its guesses."""
    return [
        Row(chunk.sequence, chunk.guesses[:taken])
        for chunk in chunks
        if chunk.samples
        for taken in range(len(chunk.guesses) + 1)
    ]


class Asked(NamedTuple):
    """Tokens of a prompt whose log-probabilities its logits tell."""

    targets: list[int]
    num_top: int
    """Most likely tokens to tell in each place."""


def scored_rows(chunks: list[Chunk]) -> list[Asked]:
    """Of each chunk that has some; before it counts as computed."""
    made = []
    for sequence, num_tokens, _, _, scored in chunks:
        if scored:
            end = min(sequence.num_computed + num_tokens, sequence.num_prompt - 1)
            targets = sequence.tokens[end - scored + 1 : end + 1]
            made.append(Asked(targets, sequence.request.top_log_probs))
    return made


def split_rows(chunks: list[Chunk]) -> tuple[list[int], list[int]]:
    """Rows of a step's logits that choose tokens, and those that tell of the prompts'."""
    choosing: list[int] = []
    telling: list[int] = []
    at = 0
    for chunk in chunks:
        telling += range(at, at + chunk.scored)
        choosing += range(at + chunk.scored, at + chunk.num_rows)
        at += chunk.num_rows
    return choosing, telling


class Scores(NamedTuple):
    """How likely given tokens are, a row each."""

    log_probs: torch.Tensor
    """[rows] float32."""
    top_ids: torch.Tensor
    """[rows, most] int64: the most likely tokens there, of equals the lowest first."""
    top_log_probs: torch.Tensor
    """[rows, most] float32."""


SLICE = 32
"""Rows of logits that are normalised at a time: in float64 they are twice as large."""


@torch.inference_mode()
def score(
    logits: torch.Tensor,
    asked: list[Asked],
    finished: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> Scores:
    """Of ``logits`` [rows, vocab], on their device; likely tokens are as many as the one with most asks for.

    ``finished`` makes float32 of a few rows, if they are not.
    """
    targets = torch.tensor([token for each in asked for token in each.targets], device=logits.device)
    most = min(max(each.num_top for each in asked), logits.shape[1])
    parts = [
        _scored(finished(logits[at : at + SLICE]), targets[at : at + SLICE], most)
        for at in range(0, len(targets), SLICE)
    ]
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _scored(logits: torch.Tensor, targets: torch.Tensor, most: int) -> Scores:
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    sums = logits.double().logsumexp(-1, keepdim=True)
    values, ids = logits.topk(most, -1)
    # topk leaves the order of equals open.
    ids, order = ids.sort(-1)
    values, by_value = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    chosen = logits.gather(1, targets[:, None])
    return Scores((chosen - sums).float()[:, 0], ids, (values - sums).float())


def told_scores(scores: Scores, asked: list[Asked]) -> list[Sampled]:
    """What is told of the prompts' tokens."""
    targets = [(token, each.num_top) for each in asked for token in each.targets]
    log_probs, ids, values = (each.tolist() for each in scores)
    return [
        Sampled(token, log_prob, tuple(zip(top[:count], near[:count], strict=True)))
        for (token, count), log_prob, top, near in zip(targets, log_probs, ids, values, strict=True)
    ]


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: list[Row], kernels: Sampler) -> list[Sampled]:
    """One token for each row of ``logits`` [rows, vocab] float32, which may be changed in place.

    What is wrong with one row, its parameters or its logits, is told of that row (token id -1).
    """
    vocab = logits.shape[1]
    if all(row.sequence.sampling_state(vocab).plain for row in rows):
        return [Sampled(token) for token in kernels.argmax(logits).tolist()]
    positions = [len(sequence.tokens) + len(guesses) for sequence, guesses in rows]
    try:
        return kernels.sample(logits, [_state(row, vocab) for row in rows], positions)
    except Exception:
        return _one_by_one(logits, rows, positions, kernels.sample)


def _state(row: Row, vocab: int) -> SamplingState:
    return row.sequence.sampling_state(vocab).after(row.guesses)


def _one_by_one(
    logits: torch.Tensor,
    rows: list[Row],
    positions: list[int],
    sample: Callable[[torch.Tensor, list[SamplingState], list[int]], list[Sampled]],
) -> list[Sampled]:
    """Finds the row with which it fails."""
    sampled = []
    for at, row in enumerate(rows):
        try:
            state = _state(row, logits.shape[1])
            sampled += sample(logits[at : at + 1], [state], positions[at : at + 1])
        except Exception as error:
            sampled.append(Sampled(-1, error=f"sampling failed: {type(error).__name__}: {error}"))
    return sampled
