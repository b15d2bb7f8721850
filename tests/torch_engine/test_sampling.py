"""Sampling on the CPU, compiled and in PyTorch, against the float64 oracle: what is kept, what is drawn, how often."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest, SamplingParams
from flightline.torch_engine.core.sampling import Row, Sampled, sample
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.kernels.cpu.native import NativeKernels, SamplingRow
from flightline.torch_engine.kernels.cpu.toolchain import compiler
from flightline.torch_engine.kernels.reference import sampling as pytorch_sampling
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.text.stream import TokenBytes
from tests.torch_engine import sampling_oracle as oracle

CPU = torch.device("cpu")
Kernels = PyTorchKernels
GREEDY = SamplingParams()


@pytest.fixture(params=["native", "pytorch"])
def kernels(request: pytest.FixtureRequest, library: str) -> Kernels:
    if request.param == "pytorch":
        return PyTorchKernels(CPU, torch.float32)
    if compiler() is None:
        pytest.skip("no C++ compiler: the build takes the PyTorch kernels")
    return NativeKernels(EngineConfig(model_dir="none", kernel_dir=library), CPU, torch.float32, 2)


def sequence(
    params: SamplingParams = GREEDY,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    end_ids: tuple[int, ...] = (),
    **fields: object,
) -> Sequence:
    request = GenerationRequest(list(prompt), 99, params, **fields)  # type: ignore[arg-type]
    made = Sequence.start("key", request, end_ids, TokenBytes([]), 0)
    made.tokens += output
    return made


def choose(kernels: Kernels, logits: np.ndarray | list, *rows: Sequence | Row) -> list[Sampled]:
    """``logits`` [rows, vocab], or one row for all."""
    values = torch.tensor(np.asarray(logits, dtype=np.float32))
    if values.ndim == 1:
        values = values.repeat(len(rows), 1)
    return sample(values, [row if isinstance(row, Row) else Row(row) for row in rows], kernels)


def kept(kernels: Kernels, logits: np.ndarray, params: SamplingParams) -> list[int]:
    """Of a row after bias and penalties; its greedy token if that is asked for."""
    state = sequence(params).sampling_state(len(logits))
    values = torch.tensor(logits)
    if params.greedy:
        token = choose(kernels, logits, sequence(params))[0].token_id
        return [token] if token >= 0 else []
    if isinstance(kernels, NativeKernels):
        mask = np.zeros(len(logits), dtype=np.uint8)
        row = SamplingRow.of(state)
        kernels.library.fl_kept(values.data_ptr(), len(logits), ctypes.byref(row), mask.ctypes.data)
        return mask.nonzero()[0].tolist()
    rows = pytorch_sampling.tidy(values[None])
    return pytorch_sampling.kept(rows, [state])[0].nonzero()[:, 0].tolist()


# Random numbers ------------------------------------------------------------------------------------------------


def test_random_words_and_noise(kernels: Kernels) -> None:
    for seed, number, position, stream, word in oracle.WORDS:
        assert int(oracle.philox(seed, number, position, stream)) == word
        count = number + 1
        if isinstance(kernels, NativeKernels):
            words, noise = np.zeros(count, dtype=np.uint32), np.zeros(count)
            at = words.ctypes.data, noise.ctypes.data
            kernels.library.fl_noise(seed, position, stream, count, *at)
        else:
            seeds, positions = np.array([seed], dtype=np.uint64), np.array([position], dtype=np.uint64)
            words = pytorch_sampling.philox(seeds, np.zeros(1), count, positions, stream)[0]
            noise = pytorch_sampling.gumbel(words)
        assert (words == oracle.philox(seed, np.arange(count), position, stream)).all()
        np.testing.assert_allclose(noise, oracle.gumbel(words), rtol=0, atol=1e-9)


def test_noise_of_known_words() -> None:
    words, noise = zip(*oracle.NOISE, strict=True)
    for gumbel in (oracle.gumbel, pytorch_sampling.gumbel):
        np.testing.assert_allclose(gumbel(np.array(words, dtype=np.uint32)), noise, rtol=0, atol=5e-6)


# What may be drawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1000, 49_152, 256_000])
@pytest.mark.parametrize("row", oracle.ROWS)
def test_kept_tokens_are_the_oracles(kernels: Kernels, row: str, vocab: int) -> None:
    for seed in range(2):
        logits = oracle.ROWS[row](vocab, seed)
        for name, params in oracle.LIMITS.items():
            assert kept(kernels, logits, params) == oracle.kept(logits, params).tolist(), (name, seed)


@pytest.mark.parametrize("row", ["peaked", "flat"])
@pytest.mark.parametrize("size", [1, 7, 100, 1500, 20_000])
def test_a_nucleus_ends_at_the_token_that_double_precision_says(
    kernels: Kernels, row: str, size: int
) -> None:
    """Where ``top_p`` is so close to the mass of ``size`` tokens that single precision cannot tell which is more."""
    logits = oracle.ROWS[row](49_152, 5)
    mass = np.sort(np.exp(logits.astype(np.float64) - logits.max()))[::-1]
    share = float(mass[:size].sum() / mass.sum())
    for top_p, count in ((share * (1 - 1e-10), size), (share * (1 + 1e-10), size + 1)):
        params = SamplingParams(temperature=1.0, top_p=top_p)
        found = kept(kernels, logits, params)
        assert len(found) == count and found == oracle.kept(logits, params).tolist()


@pytest.mark.parametrize("name", oracle.EDGES)
def test_edges(kernels: Kernels, name: str) -> None:
    values, params, expected = oracle.EDGES[name]
    logits = np.array(values, dtype=np.float32)
    if not params.logit_bias:
        assert kept(kernels, logits, params) == expected
    drawn = {choose(kernels, logits, sequence(replace(params, seed=seed)))[0].token_id for seed in range(20)}
    assert drawn <= set(expected or [-1])
    at_the_end = np.concatenate([np.full(5000, -np.inf, dtype=np.float32), logits])
    (last,) = choose(kernels, at_the_end, sequence(replace(params, seed=1, logit_bias=())))
    assert params.logit_bias or last.token_id - 5000 in expected or (last.token_id == -1 and not expected)


# What is drawn -------------------------------------------------------------------------------------------------

ASKED: dict[str, dict] = {
    "bias": {"params": {"logit_bias": ((7, 4.0), (900, -np.inf), (7, 1.5), (10**6, 9.0))}},
    "repetition": {"params": {"repetition_penalty": 1.3}},
    "presence": {"params": {"presence_penalty": 0.7, "frequency_penalty": 0.31}},
    "all penalties": {
        "params": {
            "logit_bias": ((3, -2.0), (11, 2.0)),
            "repetition_penalty": 0.8,
            "presence_penalty": -0.4,
            "frequency_penalty": 0.9,
        }
    },
    "bad words": {"params": {}, "bad_ids": ((4,), (3, 8), (8, 8, 9), (), (10**6,), (10**6, 2))},
    "minimum": {"params": {}, "min_tokens": 9, "stop_ids": (5, 6, 10**6)},
}


@pytest.mark.parametrize("vocab", [1000, 1500, 49_152])
def test_draws_are_the_oracles(kernels: Kernels, vocab: int) -> None:
    """Every way to truncate with everything that changes logits, all in one batch; equal noise, so equal tokens."""
    chance = np.random.default_rng(vocab)
    rows, logits, expected = [], [], []
    for number, (limit, asked) in enumerate(itertools.product(oracle.LIMITS.values(), ASKED.values())):
        raw = oracle.ROWS[["peaked", "flat", "tied"][number % 3]](vocab, number)
        if number % 5 == 0:
            raw[chance.integers(0, vocab, 20)] = np.nan
        prompt = tuple(chance.integers(0, 12, 30).tolist())
        output = (*chance.integers(0, 12, 5).tolist(), 8, 8) if number % 2 else (1, 3)
        params = replace(limit, seed=2**64 - 1 - number, **asked["params"])
        made = sequence(
            params, prompt, output, end_ids=(2,), **{k: v for k, v in asked.items() if k != "params"}
        )
        banned = oracle.bad_tokens(list(made.request.bad_ids), made.tokens)
        if len(output) < made.request.min_tokens:
            banned |= {2, 5, 6}
        row = oracle.processed(raw, params, list(prompt), list(output), banned)
        rows.append(made)
        logits.append(raw)
        expected.append(oracle.draw_with_margin(row, params, params.seed, len(made.tokens)))
    drawn = choose(kernels, np.array(logits), *rows)
    sure = 0
    for sampled, (token, margin) in zip(drawn, expected, strict=True):
        assert sampled.token_id == token or margin < 1e-4
        sure += margin >= 1e-4
    assert sure >= 45


def draws(kernels: Kernels, logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """Tokens that one seed draws at many positions."""
    vocab = len(logits)
    state = sequence(replace(params, seed=77)).sampling_state(vocab)
    rows = max(1, min(count, 1_000_000 // vocab))
    many = torch.tensor(logits).repeat(rows, 1)
    tokens: list[int] = []
    while len(tokens) < count:
        positions = list(range(len(tokens), len(tokens) + rows))
        tokens += [sampled.token_id for sampled in kernels.sample(many, [state] * rows, positions)]
    return np.array(tokens[:count])


# A vocabulary of twelve parts tells as much as one of fifty, which costs four times as much: what is kept of these, and
# which tokens are drawn, is compared above. PyTorch draws fewer in its time.
@pytest.mark.parametrize(
    ("kernels", "vocab", "count"),
    [("native", 12_288, 8000), ("native", 256_000, 1536), ("pytorch", 12_288, 800)],
    indirect=["kernels"],
)
@pytest.mark.parametrize(
    ("row", "limit"),
    [("peaked", "temp1"), ("peaked", "all"), ("flat", "topp"), ("flat", "temp1"), ("tied", "topk_large")],
)
def test_distribution(kernels: Kernels, row: str, limit: str, vocab: int, count: int) -> None:
    logits, params = oracle.ROWS[row](vocab, 3), oracle.LIMITS[limit]
    tokens, expected = draws(kernels, logits, params, count), oracle.probabilities(logits, params)
    if row == "peaked":
        oracle.check_distribution(tokens, expected)
    oracle.check_groups(tokens, expected)


def test_tail(kernels: Kernels) -> None:
    """Unlikely tokens are drawn as often as they should be: noise of 24 bits would miss them."""
    logits, params = oracle.tail(20_000), oracle.LIMITS["temp1"]
    expected = oracle.probabilities(logits, params)
    count = 40_000 if isinstance(kernels, NativeKernels) else 4000
    oracle.check_tail(draws(kernels, logits, params, count), expected)
    seed, token, position, *_ = oracle.RARE
    row, params = oracle.rare(), replace(params, seed=seed)
    assert oracle.draw(row, params, seed, position) == token
    assert choose(kernels, row, sequence(params, (0,) * position))[0].token_id == token


def test_two_equals_share_evenly_across_parts(kernels: Kernels) -> None:
    logits = np.full(5000, -np.inf, dtype=np.float32)
    logits[[10, 1023, 1024, 4999]] = 2.5
    tokens = draws(kernels, logits, SamplingParams(temperature=0.3, top_p=1.0), 8000)
    oracle.check_distribution(tokens, oracle.probabilities(logits, oracle.LIMITS["temp1"]))


def test_a_seed_draws_the_same_in_every_company(kernels: Kernels) -> None:
    """Alone, among others of every kind, and whatever these ask for."""
    logits = np.array([oracle.peaked(3000, seed) for seed in range(24)])
    kinds = list(oracle.LIMITS.values())
    rows = [sequence(replace(kinds[n % len(kinds)], seed=n), (1, 2, 3)) for n in range(24)]
    together = choose(kernels, logits, *rows)
    alone = [choose(kernels, logits[n : n + 1], rows[n])[0] for n in range(24)]
    assert together == alone
    rows[1::2] = [sequence(replace(kinds[(n * 5) % len(kinds)], seed=99), (7,) * n) for n in range(12)]
    assert choose(kernels, logits, *rows)[::2] == together[::2]


def test_without_a_seed_every_request_has_its_own(kernels: Kernels) -> None:
    row, params = oracle.flat(3000), oracle.LIMITS["temp1"]
    tokens = [sampled.token_id for sampled in choose(kernels, row, *(sequence(params) for _ in range(64)))]
    assert len(set(tokens)) > 55
    seeded = replace(params, seed=0)
    assert (
        len({sampled.token_id for sampled in choose(kernels, row, *(sequence(seeded) for _ in range(8)))})
        == 1
    )


def test_rows_of_guesses_draw_as_if_these_had_been_said(kernels: Kernels) -> None:
    """Row j counts the guesses before it as seen: penalties, bad words, minimum length, position of the noise."""
    logits = np.array([oracle.peaked(3000, seed) for seed in range(4)])
    params = SamplingParams(
        temperature=2.0, top_k=50, seed=5, repetition_penalty=1.7, presence_penalty=2.0, frequency_penalty=1.0
    )
    ids = tuple(int(token) for token in np.argsort(-logits[0])[:3])
    fields: dict = {"bad_ids": (ids[:2], (ids[1], ids[2])), "min_tokens": 2}
    guessing = sequence(params, (1, 2), end_ids=ids[2:], **fields)
    together = choose(kernels, logits, *(Row(guessing, ids[:taken]) for taken in range(4)))
    for taken in range(4):
        said = sequence(params, (1, 2), ids[:taken], end_ids=ids[2:], **fields)
        assert choose(kernels, logits[taken : taken + 1], said)[0] == together[taken]
    assert guessing.sampling_state(3000).num_known == 2, "guesses are not kept"


def test_greedy_rows(kernels: Kernels) -> None:
    """Argmax of the logits, the lowest id among equals, -1 without a finite one; also where a block has only NaN."""
    logits = np.full((4, 3000), np.nan, dtype=np.float32)
    logits[0, [700, 2999]] = 1, 1
    logits[1, 5:] = -np.inf
    logits[2, 0] = -3e38
    logits[3, [9, 2000]] = 5, np.inf
    plain = [sequence() for _ in range(4)]
    assert [sampled.token_id for sampled in choose(kernels, logits, *plain)] == [700, -1, 0, 2000]
    cold = [sequence(SamplingParams(temperature=9e-6, top_k=50, top_p=0.9, seed=n)) for n in range(4)]
    assert [sampled.token_id for sampled in choose(kernels, logits, *cold)] == [700, -1, 0, 2000]
    assert not SamplingParams(temperature=1.1e-5, top_k=50).greedy


# Log-probabilities ---------------------------------------------------------------------------------------------


def test_log_probs_are_of_the_logits_as_they_came(kernels: Kernels) -> None:
    logits = np.array([oracle.ROWS[name](3000, 1) for name in ("peaked", "flat", "tied", "peaked", "tied")])
    logits[2, 4] = np.nan
    logits[3, :2990] = -np.inf
    params = SamplingParams(temperature=0.5, top_p=0.8, seed=3, repetition_penalty=2.0)
    rows = [
        sequence(params, (1, 5), return_log_probs=True, top_log_probs=count) for count in (0, 5, 20, 20)
    ] + [sequence(params)]
    for row, (sampled, asked) in enumerate(zip(choose(kernels, logits, *rows), rows, strict=True)):
        expected = oracle.log_probs(logits[row])
        if row == 4:
            assert sampled.log_prob == 0.0 and sampled.top == ()
            continue
        assert sampled.log_prob == pytest.approx(expected[sampled.token_id], abs=2e-5)
        count = min(asked.request.top_log_probs, int(np.isfinite(expected).sum()))
        ids = oracle.top(logits[row], count)
        assert [token for token, _ in sampled.top] == ids
        np.testing.assert_allclose([value for _, value in sampled.top], expected[ids], atol=2e-5)
    (greedy,) = choose(kernels, logits[:1], sequence(return_log_probs=True, top_log_probs=3))
    assert greedy.top[0] == (greedy.token_id, greedy.log_prob)


# Neighbours ----------------------------------------------------------------------------------------------------


def test_an_empty_bad_word_bans_nothing(kernels: Kernels) -> None:
    (sampled,) = choose(kernels, [1.0, 3.0, 2.0], sequence(bad_ids=((), (1,))))
    assert sampled.token_id == 2


def test_a_row_without_logits_is_alone_with_it(kernels: Kernels) -> None:
    logits = np.array([oracle.peaked(3000, seed) for seed in range(16)])
    rows = [sequence(replace(oracle.LIMITS["topp"], seed=n), return_log_probs=bool(n % 3)) for n in range(16)]
    before = choose(kernels, logits, *rows)
    logits[7] = np.nan
    after = choose(kernels, logits, *rows)
    assert after[7].token_id == -1 and after[7].error == "the model gave no finite logit"
    assert after[:7] + after[8:] == before[:7] + before[8:]


@pytest.mark.parametrize("broken", ["request", "arrays"])
def test_an_exception_in_a_row_is_its_own(kernels: Kernels, broken: str) -> None:
    logits = np.array([oracle.peaked(3000, seed) for seed in range(16)])
    rows = [sequence(replace(oracle.LIMITS["topp"], seed=n, repetition_penalty=1.1), (n,)) for n in range(16)]
    before = choose(kernels, logits, *rows)
    if broken == "request":
        rows[7] = sequence(replace(oracle.LIMITS["topp"], repetition_penalty=1.1), bad_ids=(("a", "b"),))
    else:
        rows[7].sampling_state(3000).temperature = "hot"  # type: ignore[assignment]
        rows[7].sampling_state(3000).made = None
    after = choose(kernels, logits, *rows)
    assert after[7].token_id == -1 and after[7].error.startswith("sampling failed: ")
    assert after[:7] + after[8:] == before[:7] + before[8:]
