"""Sampling in PyTorch, all rows of a step together: see ``core/sampling.py`` for what is computed.

The vocabulary is not sorted. Where the likeliest ``CANDIDATES`` tokens do not hold a nucleus, its last token is found
by halving the range of values, which takes 32 sums over the rows concerned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flightline.torch_engine.core.sampling import PART, Sampled
from flightline.torch_engine.core.sampling_state import SamplingState

CANDIDATES = 256
TOKEN_STREAM, PART_STREAM = 0, 1


def sample(logits: torch.Tensor, states: list[SamplingState], positions: list[int]) -> list[Sampled]:
    """One token for each row of ``logits`` [rows, vocab] float32; ``positions`` is where it will stand."""
    raw = tidy(logits)
    x = _adjusted(raw, states, positions)
    highest, tokens = x.max(-1)
    drawn = [row for row, state in enumerate(states) if not state.greedy and highest[row] > -torch.inf]
    if drawn:
        tokens[drawn] = _draw(x[drawn], [states[row] for row in drawn], [positions[row] for row in drawn])
    told = _told(raw, tokens, states)
    return [
        Sampled(token, *told.get(row, ())) if best > -torch.inf else Sampled(-1)
        for row, (token, best) in enumerate(zip(tokens.tolist(), highest.tolist(), strict=True))
    ]


def tidy(logits: torch.Tensor) -> torch.Tensor:
    """A copy in which NaN is -inf and +inf the largest number."""
    return logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def _adjusted(x: torch.Tensor, states: list[SamplingState], positions: list[int]) -> torch.Tensor:
    """Bias, penalties, bans and masks; a copy if there are any."""
    vocab = x.shape[1]
    original, device = x, x.device

    def pairs(ids: list[NDArray[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
        return torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(
            device
        )

    if any(len(state.bias_ids) for state in states):
        values = torch.from_numpy(np.concatenate([state.biases for state in states])).to(device)
        x = x.index_put(pairs([state.bias_ids for state in states]), values, accumulate=True)
    if any(len(state.seen) for state in states):
        some = [row for row, state in enumerate(states) if len(state.seen)]
        bits = np.unpackbits(
            np.stack([states[row].seen for row in some]), axis=1, count=vocab, bitorder="little"
        )
        seen = torch.from_numpy(bits.view(bool)).to(device)
        penalty = torch.tensor([[states[row].repetition] for row in some], dtype=torch.float32, device=device)
        values = x[some]
        x = x.clone() if x is original else x
        x[some] = torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)
    if any(len(state.generated) for state in states):
        where = pairs([state.generated for state in states])
        amounts = torch.from_numpy(np.concatenate([state.amounts for state in states])).to(device)
        x = x.index_put(where, x[where] - amounts)
    bans = [
        [state.banned, state.matched, *([state.ends] if position < state.ends_from else [])]
        for state, position in zip(states, positions, strict=True)
    ]
    if any(len(ids) for each in bans for ids in each):
        x = x.index_put(pairs([np.concatenate(each) for each in bans]), x.new_tensor(-torch.inf))
    masks = {row: state.allowed for row, state in enumerate(states) if state.allowed is not None}
    if masks:
        some = list(masks)
        words = np.stack([masks[row] for row in some]).view(np.uint8)
        allowed = np.unpackbits(words, axis=1, count=vocab, bitorder="little").view(bool)
        x = x.clone() if x is original else x
        x[some] = x[some].masked_fill(torch.from_numpy(~allowed).to(device), -torch.inf)
    return x if x is original else tidy(x)


def _told(
    raw: torch.Tensor, tokens: torch.Tensor, states: list[SamplingState]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log-probability and most likely tokens of the rows that ask for them."""
    rows = [row for row, state in enumerate(states) if state.num_top >= 0]
    if not rows:
        return {}
    values = raw[rows]
    normalisers = values.double().logsumexp(-1, keepdim=True)
    chosen = (values.gather(1, tokens[rows, None]) - normalisers).float()[:, 0].tolist()
    counts = [states[row].num_top for row in rows]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    if any(counts):
        limits = torch.tensor(counts, device=raw.device)
        kept = _first(values, limits.clamp(min=1)) & (values > -torch.inf)
        for at, count in enumerate(counts):
            ids = kept[at].nonzero()[:count, 0] if count else kept.new_empty(0, dtype=torch.int64)
            log_probs = (values[at, ids] - normalisers[at]).float()
            order = values[at, ids].sort(descending=True, stable=True).indices
            tops[at] = tuple(zip(ids[order].tolist(), log_probs[order].tolist(), strict=True))
    return {row: (log_prob, top) for row, log_prob, top in zip(rows, chosen, tops, strict=True)}


# Which tokens may be drawn ---------------------------------------------------------------------------------


def kept(x: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    """Which tokens of rows that are not greedy may be drawn: bool like ``x`` [rows, vocab]."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(state, name) for state in states], dtype=dtype, device=x.device)

    result = x > -torch.inf
    top_k, top_p, least = (
        column("top_k", torch.int64),
        column("top_p", torch.float64),
        column("least", torch.float64),
    )
    rows = top_k.nonzero()[:, 0]
    if len(rows):
        result[rows] &= _first(x[rows], top_k[rows])
    rows = (top_p < 1).nonzero()[:, 0]
    if len(rows):
        temperature = column("temperature", torch.float64)[rows]
        result[rows] &= _nucleus(x[rows], result[rows], temperature, top_p[rows])
    rows = (least > -torch.inf).nonzero()[:, 0]
    if len(rows):
        wide = x[rows].double()
        result[rows] &= wide - wide.amax(-1, keepdim=True) >= least[rows, None]
    return result


def _first(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The first ``counts`` [rows] tokens of each row."""
    counts = counts.clamp(max=x.shape[1])
    values = x.topk(int(counts.max())).values
    return _up_to(x, values.gather(1, counts[:, None] - 1), counts)


def _up_to(x: torch.Tensor, last: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Tokens not below ``last`` [rows, 1], but no more than ``counts`` [rows]: of equals the lowest ids."""
    result = x >= last
    crowded = (result.sum(-1) > counts).nonzero()[:, 0]
    if len(crowded):
        values, last = x[crowded], last[crowded]
        equal = values == last
        room = counts[crowded] - (values > last).sum(-1)
        result[crowded] &= ~equal | (equal.cumsum(-1) <= room[:, None])
    return result


def _nucleus(
    x: torch.Tensor, allowed: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Of the allowed tokens the first ones, until they have ``top_p`` [rows] of the mass."""
    x = x.masked_fill(~allowed, -torch.inf)
    highest = x.amax(-1, keepdim=True).double()

    def mass_of(values: torch.Tensor) -> torch.Tensor:
        return ((values.double() - highest) / temperature[:, None]).exp_()

    mass = mass_of(x)
    target = top_p * mass.sum(-1)
    values = x.topk(min(CANDIDATES, x.shape[1])).values
    candidates = mass_of(values)
    before = candidates.cumsum(-1) - candidates
    counts = (before < target[:, None]).sum(-1).clamp(min=1)
    result = _up_to(x, values.gather(1, counts[:, None] - 1), counts)
    rows = (candidates.sum(-1) < target).nonzero()[:, 0]
    if len(rows):
        result[rows] = _up_to(x[rows], *_halving(x[rows], mass[rows], target[rows]))
    return result & allowed


def _halving(x: torch.Tensor, mass: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of a nucleus' last token [rows, 1], and how many tokens there are up to it [rows]."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0: -0 is 0
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    low, high = (
        keys.amin(-1),
        keys.amax(-1),
    )  # the lowest key above which there is less than the target is in here
    while bool((low < high).any()):
        middle = (low + high) >> 1
        fits = (mass * (keys > middle[:, None])).sum(-1) < target
        low, high = torch.where(fits, low, middle + 1), torch.where(fits, middle, high)
    above, equal = keys > low[:, None], keys == low[:, None]
    each = mass[torch.arange(len(x), device=x.device), equal.int().argmax(-1)]
    room = ((target - (mass * above).sum(-1)) / each).ceil().long().clamp(min=1)
    last = torch.where(equal, x, torch.inf).amin(-1, keepdim=True)
    return last, above.sum(-1) + torch.minimum(room, equal.sum(-1))


# Drawing one of them ---------------------------------------------------------------------------------------


def _draw(x: torch.Tensor, states: list[SamplingState], positions: list[int]) -> torch.Tensor:
    """A token of each row [rows] int64."""
    device, count = x.device, len(states)
    temperature = torch.tensor([[state.temperature] for state in states], dtype=torch.float64, device=device)
    scores = ((x.double() - x.amax(-1, keepdim=True)) / temperature).masked_fill_(
        ~kept(x, states), -torch.inf
    )
    parts = -(-x.shape[1] // PART)
    scores = F.pad(scores, (0, parts * PART - x.shape[1]), value=-torch.inf).view(count, parts, PART)
    seeds = np.array([state.seed for state in states], dtype=np.uint64)
    places = np.array(positions, dtype=np.uint64)
    noise = gumbel(philox(seeds, np.zeros_like(places), parts, places, PART_STREAM))
    part = (scores.logsumexp(-1).cpu().numpy() + noise).argmax(-1)
    inside = scores[torch.arange(count, device=device), torch.from_numpy(part).to(device)].cpu().numpy()
    noise = gumbel(philox(seeds, part * PART, PART, places, TOKEN_STREAM))
    return torch.from_numpy(part * PART + (inside + noise).argmax(-1)).to(device)


def philox(
    seeds: NDArray[Any], firsts: NDArray[Any], count: int, positions: NDArray[Any], stream: int
) -> NDArray[Any]:
    """Words of Philox-4x32-10 [rows, count] uint32 for the numbers from ``firsts`` [rows] on, multiples of 4.

    Key: a seed's halves; counter: (number // 4, position, stream, 0); and of the four words the (number % 4)-th.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    blocks = firsts.astype(np.uint64)[:, None] // np.uint64(4) + np.arange(-(-count // 4), dtype=np.uint64)
    c0, c2, c3 = blocks, np.full_like(blocks, stream), np.zeros_like(blocks)
    c1 = np.broadcast_to(positions[:, None] & low, blocks.shape)
    k0, k1 = seeds[:, None] & low, seeds[:, None] >> half
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & low, (a >> half) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    words: NDArray[np.uint32] = np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)
    return words.reshape(len(seeds), -1)[:, :count]


def gumbel(words: NDArray[Any]) -> NDArray[Any]:
    """Gumbel noise of random words, float64: all 32 bits count, so that the largest is 22.9."""
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    uniform = np.minimum(uniform, np.float32(1 - 2.0**-24)).astype(np.float64)
    noise: NDArray[np.float64] = -np.log(-np.log1p(-uniform))
    return noise
