"""What sampling has to be, in float64 and NumPy: slow, sorted, and plain enough to be checked by reading.

All implementations (PyTorch, the compiled CPU kernels, the GPU's in Triton's interpreter and on a GPU) are tested
against this module: their random words against ``WORDS``, the tokens they keep against :func:`kept`, what they draw
against :func:`draw` (equal noise) and against :func:`probabilities` (the distribution).

The order for a row: raw logits (log-probabilities are taken of these) - bias - repetition, presence and frequency
penalty - banned tokens - divided by the temperature - top-k - top-p - min-p - draw.
"""

from __future__ import annotations

import math

import numpy as np

from flightline.torch_engine.core.request import SamplingParams

PART = 1024
"""Tokens with consecutive ids that are drawn from together: fixed, so that no batch and no device changes a draw."""
TOKEN_STREAM, PART_STREAM = 0, 1
MOST = np.finfo(np.float32).max

WORDS = [
    # Key 0, counter 0: a known answer of Random123 (Salmon et al. 2011), whose other two this philox gives as well.
    (0, 0, 0, 0, 0x6627E8D5),
    (0, 1, 0, 0, 0xE169C58D),
    (0, 2, 0, 0, 0xBC57AC4C),
    (0, 3, 0, 0, 0x9B00DBD8),
    (0, 4, 0, 0, 0xF8E4CCA4),
    (1, 0, 0, 1, 0x07071C12),
    (7, 1023, 15, 0, 0x8C78B9D9),
    (7, 1024, 15, 0, 0x68EBBD82),
    (2**64 - 1, 128255, 131071, 0, 0xC3970227),
    (2**64 - 1, 125, 131071, 1, 0xC4A0520F),
    (0x0123456789ABCDEF, 49151, 2**31, 0, 0x841159DC),
]
"""(seed, token id or part number, position, stream, the random word)."""

RARE = (128469, 566, 15, 0, 11)
"""Of the same form: noise of 19.7, which no uniform number of 24 bits gives. See :func:`rare`."""

NOISE = [
    (0x00000000, 22.8738570),
    (0x00000001, 21.7752446),
    (0x00100000, 8.3176436),
    (0x07071C12, 3.5814219),
    (0x6627E8D5, 0.6748399),
    (0x80000000, 0.3665129),
    (0xC4A0520F, -0.3793440),
    (0xFFFFFFFF, -2.8115410),
]
"""(random word, Gumbel noise made of it, to 5e-6)."""


def philox(seed: int, numbers: np.ndarray | int, position: int, stream: int) -> np.ndarray:
    """Words of Philox-4x32-10 (Salmon et al. 2011) for token ids or part numbers: uint32, shaped like ``numbers``.

    Key: the seed's two halves. Counter: (n // 4, position, stream, 0), and of its four words the (n % 4)-th.
    """
    numbers = np.asarray(numbers, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    zero = np.zeros_like(numbers)
    c0, c1, c2, c3 = (
        numbers // np.uint64(4),
        zero + np.uint64(position & 0xFFFFFFFF),
        zero + np.uint64(stream),
        zero,
    )
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    lane = numbers % np.uint64(4)
    return np.select([lane == 0, lane == 1, lane == 2], [c0, c1, c2], c3).astype(np.uint32)


def gumbel(words: np.ndarray) -> np.ndarray:
    """Gumbel noise of random words: v = (word + 1/2) / 2^32 rounded to float32, -log(-log1p(-v)); float64."""
    v = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1 - 2.0**-24)).astype(np.float64)
    return -np.log(-np.log1p(-v))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32: the heads of GPU models give these, so that ties are common."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


# From raw logits to tokens --------------------------------------------------------------------------------------


def clean(logits: np.ndarray) -> np.ndarray:
    """NaN counts as -inf, +inf as the largest finite number: float32 [vocab]."""
    logits = np.asarray(logits, dtype=np.float32)
    return np.where(np.isnan(logits), np.float32(-np.inf), np.minimum(logits, MOST))


def log_probs(logits: np.ndarray) -> np.ndarray:
    """Of raw logits: float64 [vocab]."""
    values = clean(logits).astype(np.float64)
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def top(logits: np.ndarray, count: int) -> list[int]:
    """The most likely tokens of raw logits, the lowest id first among equals."""
    return [int(token) for token in np.argsort(-clean(logits), kind="stable")[:count]]


def processed(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int] = (),  # type: ignore[assignment]
    output: list[int] = (),  # type: ignore[assignment]
    banned: set[int] | frozenset[int] = frozenset(),
) -> np.ndarray:
    """What the draw starts from: float32 [vocab]. ``banned``: bad words' last tokens, end ids that may not come yet.

    Each operation is rounded to float32 once; an id outside the vocabulary is of no effect.
    """
    row = clean(logits).copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for token, bias in params.logit_bias:
            if token < len(row):
                row[token] += np.float32(bias)
        penalty = np.float32(params.repetition_penalty)
        if penalty != 1:
            for token in {*prompt, *output}:
                row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        if params.presence_penalty or params.frequency_penalty:
            for token in set(output):
                amount = float(np.float32(params.presence_penalty))
                amount += float(np.float32(params.frequency_penalty)) * list(output).count(token)
                row[token] -= np.float32(amount)
    for token in banned:
        if 0 <= token < len(row):
            row[token] = -np.inf
    return clean(row)


def bad_tokens(words: list[tuple[int, ...]], tokens: list[int]) -> set[int]:
    """The last tokens of bad words whose other tokens have just been said, in the prompt or in the output."""
    return {
        word[-1] for word in words if word and (len(word) == 1 or tuple(tokens[1 - len(word) :]) == word[:-1])
    }


def kept(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ids of the tokens that may be drawn, ascending; ``row`` is :func:`processed`.

    Tokens stand in the order (value descending, id ascending). Top-k keeps the first k. Top-p keeps those whose
    predecessors have less than ``top_p`` of the mass that top-k left; always one. Min-p keeps those of at least
    ``min_p`` times the most likely one's probability. Tokens at -inf never come.
    """
    row = row.astype(np.float64)
    order = np.argsort(-row, kind="stable")
    order = order[row[order] > -np.inf]
    if not len(order):
        return order
    if params.greedy:
        return order[:1]
    if params.top_k:
        order = order[: params.top_k]
    shifted = row[order] - row[order[0]]
    if params.top_p and params.top_p < 1:
        mass = np.exp(shifted / params.temperature)
        before = np.cumsum(mass) - mass
        order = order[: max(1, int((before < params.top_p * mass.sum()).sum()))]
        shifted = shifted[: len(order)]
    if params.min_p:
        order = order[shifted >= params.temperature * math.log(params.min_p)]
    return np.sort(order)


def probabilities(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Of each token to be drawn: float64 [vocab]."""
    ids = kept(row, params)
    values = row[ids].astype(np.float64)
    mass = np.exp((values - values.max()) / (1.0 if params.greedy else params.temperature))
    result = np.zeros(len(row))
    result[ids] = mass / mass.sum()
    return result


def draw(row: np.ndarray, params: SamplingParams, seed: int, position: int) -> int:
    """The token for ``position`` (counted from the prompt's first token): Gumbel-max over parts, then inside one.

    -1 if no logit is finite.
    """
    return draw_with_margin(row, params, seed, position)[0]


def draw_with_margin(row: np.ndarray, params: SamplingParams, seed: int, position: int) -> tuple[int, float]:
    """The token, and by how much the nearest other one lost: below about 1e-5 rounding may choose that one."""
    ids = kept(row, params)
    if not len(ids):
        return -1, math.inf
    if len(ids) == 1:
        return int(ids[0]), math.inf
    values = row[ids].astype(np.float64)
    values = (values - values.max()) / params.temperature
    number = ids // PART
    parts = np.unique(number)
    sums = [np.logaddexp.reduce(values[number == part]) for part in parts]
    part, margin = _highest(np.array(sums) + gumbel(philox(seed, parts, position, PART_STREAM)))
    inside = number == parts[part]
    token, closer = _highest(values[inside] + gumbel(philox(seed, ids[inside], position, TOKEN_STREAM)))
    return int(ids[inside][token]), min(margin, closer)


def _highest(scores: np.ndarray) -> tuple[int, float]:
    best = int(scores.argmax())
    others = np.delete(scores, best)
    return best, float(scores[best] - others.max()) if len(others) else math.inf


# Rows to draw from ----------------------------------------------------------------------------------------------


def peaked(vocab: int, seed: int = 0) -> np.ndarray:
    """Like a trained model's: a few likely tokens, the others far below; bfloat16."""
    chance = np.random.default_rng(seed)
    row = chance.normal(0, 2.2, vocab)
    row[chance.choice(vocab, 40, replace=False)] += np.linspace(14, 6, 40)
    return bfloat16(row)


def flat(vocab: int, seed: int = 0) -> np.ndarray:
    """Like random weights': nobody is likely; bfloat16."""
    return bfloat16(np.random.default_rng(seed).normal(0, 0.8, vocab))


def tied(vocab: int, seed: int = 0) -> np.ndarray:
    """Seven values only, so that every limit falls among equals."""
    return np.random.default_rng(seed).integers(-3, 4, vocab).astype(np.float32)


def tail(vocab: int, seed: int = 0) -> np.ndarray:
    """One token at 0, ``vocab - 1`` between 14 and 20 below: together :func:`probabilities` of some hundredths.

    Uniform numbers of 24 bits cannot give noise large enough for these.
    """
    row = -np.random.default_rng(seed).uniform(14, 20, vocab).astype(np.float32)
    row[vocab // 2] = 0
    return row


def rare(vocab: int = 1024) -> np.ndarray:
    """A row from which seed and position of ``RARE`` draw its token, 16 below the other one."""
    row = np.full(vocab, -np.inf, dtype=np.float32)
    row[[0, RARE[1]]] = 16, 0
    return row


ROWS = {"peaked": peaked, "flat": flat, "tied": tied}

LIMITS = {
    "temp1": SamplingParams(temperature=1.0, top_k=0, top_p=1.0),
    "topk": SamplingParams(temperature=0.8, top_k=50),
    "topk_large": SamplingParams(temperature=1.0, top_k=5000),
    "topp": SamplingParams(temperature=0.7, top_p=0.9),
    "topp_hot": SamplingParams(temperature=1.7, top_p=0.99),
    "topk_topp": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "minp": SamplingParams(temperature=1.0, min_p=0.05),
    "all": SamplingParams(temperature=1.2, top_k=1000, top_p=0.9, min_p=0.01),
}
"""Ways to truncate that every implementation's kept set is compared for, on all ``ROWS``."""

_INF, _NAN = np.inf, np.nan
EDGES: dict[str, tuple[list[float], SamplingParams, list[int]]] = {
    "top-k of 1 is the argmax": ([1, 3, 2], SamplingParams(temperature=5.0, top_k=1), [1]),
    "a tiny top-p keeps one": ([1, 3, 3], SamplingParams(top_p=1e-30), [1]),
    "top-p of 1 keeps all": ([1, -80, 2], SamplingParams(top_p=1.0), [0, 1, 2]),
    "top-k of the vocabulary keeps all": ([1, 3, 2], SamplingParams(top_k=3), [0, 1, 2]),
    "top-k above the vocabulary": ([1, 3, 2], SamplingParams(top_k=1000), [0, 1, 2]),
    "top-p's boundary hit exactly": ([0, 0, 0, 0], SamplingParams(top_p=0.5), [0, 1]),
    "top-p just above the boundary": ([0, 0, 0, 0], SamplingParams(top_p=0.50001), [0, 1, 2]),
    "-0 equals 0": ([0.0, -0.0, -1, 0.0], SamplingParams(top_k=2), [0, 1]),
    "all equal, top-k": ([2] * 9, SamplingParams(top_k=4), [0, 1, 2, 3]),
    "ties at the k-th": ([1, 5, 3, 3, 3, 0], SamplingParams(top_k=3), [1, 2, 3]),
    "ties at the nucleus' end": ([1, 5, 5, 5, -9, 5], SamplingParams(top_p=0.6), [1, 2, 3]),
    "top-p of what top-k left": ([0, 0, 0, 0, 0, 0, 0, 0], SamplingParams(top_k=4, top_p=0.5), [0, 1]),
    "a low temperature": (
        [1e4, 1e4 - 1, -1e4],
        SamplingParams(temperature=1.1e-5, top_k=0, top_p=1.0),
        [0, 1, 2],
    ),
    "a temperature that means greedy": ([1, 4, 4, 3], SamplingParams(temperature=1e-6, top_p=0.9), [1]),
    "temperature 0": ([1, 4, 4, 3], SamplingParams(temperature=0.0, top_k=50), [1]),
    "one finite": ([-_INF, -_INF, -7, -_INF], SamplingParams(top_p=1.0), [2]),
    "fewer finite than top-k": ([-_INF, 3, -7, -_INF], SamplingParams(top_k=3), [1, 2]),
    "NaN counts as -inf": ([_NAN, 3, 2, _NAN], SamplingParams(top_k=4), [1, 2]),
    "NaN, greedy": ([_NAN, 3, 2, _NAN], SamplingParams(), [1]),
    "+inf stands above all": ([1, _INF, 2, _INF], SamplingParams(top_p=0.9), [1, 3]),
    "+inf, greedy": ([1, 2, _INF, _INF], SamplingParams(), [2]),
    "all -inf": ([-_INF] * 5, SamplingParams(top_p=1.0), []),
    "all -inf, greedy": ([-_INF] * 5, SamplingParams(), []),
    "all NaN": ([_NAN] * 5, SamplingParams(top_k=2), []),
    "all NaN, greedy": ([_NAN] * 5, SamplingParams(), []),
    "min-p of 1 keeps the equals": ([5, 1, 5, 4.999], SamplingParams(min_p=1.0), [0, 2]),
    "min-p's boundary": ([0, -1, -2, -3], SamplingParams(temperature=0.5, min_p=0.0183), [0, 1, 2]),
    "a bias bans": ([1, 9, 2], SamplingParams(logit_bias=((1, -_INF), (77, 3.0))), [2]),
    "a bias before the penalties": ([-1, -9], SamplingParams(logit_bias=((1, 8.5),)), [1]),
}
"""Name -> (logits, what is asked, ids kept). Nothing kept: an error of that row, token id -1."""


def check_distribution(tokens: np.ndarray, expected: np.ndarray, total_variation: bool = True) -> None:
    """Draws against the probabilities they should have: chi-square (p > 1e-5), and the total variation distance.

    Tokens expected less than five times are counted together. A right sampler's total variation is about
    sum sqrt(p (1 - p) / (2 pi N)); half as much again is the limit, or more where few tokens vary much.
    """
    counts = np.bincount(tokens, minlength=len(expected)).astype(np.float64)
    assert not counts[expected == 0].any(), "a token was drawn that is not kept"
    draws = len(tokens)
    often = expected * draws >= 5
    seen, wanted = counts[often], expected[often] * draws
    if not often.all():
        seen, wanted = (
            np.append(seen, counts[~often].sum()),
            np.append(wanted, expected[~often].sum() * draws),
        )
    if wanted[-1] == 0:
        seen, wanted = seen[:-1], wanted[:-1]
    assert len(wanted) > 1, "too few draws to tell anything"
    z = _chi_square_z(float(((seen - wanted) ** 2 / wanted).sum()), len(wanted) - 1)
    assert math.erfc(z / math.sqrt(2)) / 2 > 1e-5, f"chi-square is {z:.1f} standard deviations above its mean"
    if total_variation:
        p = np.minimum(wanted / draws, 1)
        distance = np.abs(seen / draws - p).sum() / 2
        mean = np.sqrt(p * (1 - p) / (2 * math.pi * draws)).sum()
        limit = max(1.5 * mean, mean + 2 * math.sqrt((p * (1 - p) / draws).sum()))
        assert distance <= limit, f"total variation {distance:.5f}, limit {limit:.5f}"


def check_groups(tokens: np.ndarray, expected: np.ndarray) -> None:
    """As :func:`check_distribution` for rows on which each token is rare: by part, and by remainder of the id."""
    assert not (expected[tokens] == 0).any(), "a token was drawn that is not kept"
    ids = np.arange(len(expected))
    for group in (ids // PART % 16, ids % 13):
        check_distribution(group[tokens], np.bincount(group, weights=expected))


def check_tail(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Draws from :func:`tail`: how often it was not the likeliest token, within 4.5 standard deviations."""
    likeliest = int(expected.argmax())
    p, draws = 1 - float(expected[likeliest]), len(tokens)
    z = ((tokens != likeliest).sum() - p * draws) / math.sqrt(draws * p * (1 - p))
    assert abs(z) < 4.5, f"the tail was drawn {z:+.1f} standard deviations off"


def _chi_square_z(statistic: float, freedom: int) -> float:
    """As a standard normal's value (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
