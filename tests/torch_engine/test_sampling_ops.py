"""The sampling kernels against the oracle: in Triton's interpreter on a CPU, on a GPU with ``-m gpu``."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest, RequestError, SamplingParams
from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.text.stream import TokenBytes
from tests.tiny import tiny_checkpoint
from tests.torch_engine import sampling_oracle as oracle
from tests.torch_engine.test_speculation import eager
from tests.torch_engine.test_triton_ops import (
    DEVICE,
    INTERPRETED,
    ON_GPU,
    RUNS,
    kernel,
)

if RUNS:
    from flightline.torch_engine.kernels.gpu import sampling_ops as ops
    from flightline.torch_engine.kernels.gpu.device_sampling import DeviceSampling
    from flightline.torch_engine.kernels.gpu.sampling_tables import COUNTED, FLAGS, MASKED, Choice

WORDS = TokenBytes([b"a"])
KINDS = [
    SamplingParams(),
    SamplingParams(top_p=1.0),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(min_p=0.05),
    SamplingParams(top_k=7),
    SamplingParams(temperature=1.3, top_k=200, top_p=0.5, min_p=0.01),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, top_p=0.8),
    SamplingParams(logit_bias=((5, 3.0), (250, -math.inf), (299, 2.0), (5, -0.5)), top_p=0.9),
    SamplingParams(top_k=3, top_p=1e-6),
    SamplingParams(temperature=1e-4, top_p=1.0),
]
PENALISED = 7
SHAPES = {"peaked": 4.0, "flat": 0.8, "tied": 2.0, "equal": 0.0}
LAYERS = 2 if ON_GPU else 1
VOCABULARIES = [300, 1024, 50_257, 128_256, 151_936, 256_000] if ON_GPU else [1100]


def sequence(
    params: SamplingParams, prompt: list[int], output: list[int], seed: int, **asked: object
) -> Sequence:
    request = GenerationRequest(prompt, 100, sampling=params, **asked)  # type: ignore[arg-type]
    made = Sequence.start(0, request, (1,), WORDS, 1)
    made.tokens += output
    made.seed = seed
    return made


class Rows:
    """Sequences in slots of their own, and one row of logits for each."""

    def __init__(self, sequences: list[Sequence], vocab: int) -> None:
        self.sequences = sequences
        self.sampling = DeviceSampling(len(sequences) + 1, vocab, DEVICE)
        for slot, each in enumerate(sequences):
            self.sampling.assign(slot, each)
        self.sampling.flush()

    def draw(
        self, logits: np.ndarray | torch.Tensor, positions: list[int] | None = None, searches: bool = True
    ) -> Choice:
        count = len(self.sequences)
        choice = Choice.empty(count, DEVICE)
        places = positions or [len(each.tokens) for each in self.sequences]
        ops.sample(
            torch.as_tensor(logits, device=DEVICE), None, None, None,
            torch.arange(count, dtype=torch.int32, device=DEVICE),
            torch.tensor(places, dtype=torch.int32, device=DEVICE) - 1,
            self.sampling.tables, torch.zeros(count + 1, dtype=torch.int32, device=DEVICE), choice, searches,
        )  # fmt: skip
        return choice


def kept(
    asked: list[SamplingParams], logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> list[np.ndarray]:
    """Ids of each row that may be drawn, as the kernels leave them between themselves."""
    made: list[ops.Scratch] = []
    empty = ops.Scratch.empty

    def watched(*sizes: object) -> ops.Scratch:
        made.append(empty(*sizes))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(ops.Scratch, "empty", watched)
    Rows([sequence(params, [1], [], 3) for params in asked], logits.shape[1]).draw(logits)
    ids = np.arange(logits.shape[1])
    rows = zip(logits, made[0].bounds.tolist(), made[0].cuts.tolist(), strict=True)
    clean = [(oracle.clean(row), bound, cut) for row, bound, cut in rows]
    return [ids[(row > bound) | ((row == bound) & (ids <= cut))] for row, bound, cut in clean]


def draws(logits: np.ndarray, params: SamplingParams, count: int, batch: int = 500) -> np.ndarray:
    """Tokens drawn from one row with ``batch`` seeds, at as many positions as it takes."""
    rows = Rows([sequence(params, [1], [], seed) for seed in range(batch)], len(logits))
    many = torch.from_numpy(np.ascontiguousarray(logits)).to(DEVICE).expand(batch, -1).contiguous()
    steps = [rows.draw(many, [1 + step] * batch).tokens for step in range(count // batch)]
    return torch.cat(steps).cpu().numpy()


class TestKernels:
    pytestmark = kernel

    @pytest.mark.parametrize("shape", SHAPES if ON_GPU else ["peaked", "tied"])
    @pytest.mark.parametrize("vocab", VOCABULARIES)
    def test_every_kind_draws_what_the_oracle_draws(self, vocab: int, shape: str) -> None:
        chance = np.random.default_rng(vocab)
        logits = chance.standard_normal((len(KINDS), vocab)).astype(np.float32) * SHAPES[shape]
        logits = oracle.bfloat16(np.round(logits) if shape == "tied" else logits)
        seeds = [0, 2**64 - 1, *(int(seed) for seed in chance.integers(0, 2**63, len(KINDS) - 2))]
        prompts = [chance.integers(0, vocab, 5).tolist() for _ in KINDS]
        outputs = [[*chance.integers(0, vocab, 6).tolist(), 3, 3] for _ in KINDS]
        said = [*prompts[PENALISED][:2], *outputs[PENALISED][:2]]
        logits[PENALISED, said] = -np.inf, np.nan, -np.inf, np.nan  # and stay there
        told = {"return_log_probs": True, "top_log_probs": 3}
        rows = Rows(
            [sequence(*each, **told) for each in zip(KINDS, prompts, outputs, seeds, strict=True)], vocab
        )
        choice = rows.draw(logits)
        for row, params in enumerate(KINDS):
            adjusted = oracle.processed(logits[row], params, prompts[row], outputs[row])
            expected, margin = oracle.draw_with_margin(adjusted, params, seeds[row], 13)
            token = int(choice.tokens[row])
            assert token == expected or margin < 1e-5, (params, margin)
            log_probs = oracle.log_probs(logits[row])
            assert float(choice.log_probs[row]) == pytest.approx(log_probs[token], abs=1e-4)
            likeliest = oracle.top(logits[row], 3)
            assert choice.top_ids[row, :3].tolist() == likeliest
            assert choice.top_log_probs[row, :3].tolist() == pytest.approx(log_probs[likeliest], abs=1e-4)

    @pytest.mark.parametrize(
        ("vocab", "kind", "few"),
        [*itertools.product(VOCABULARIES[-2:], oracle.ROWS, [False, True])]
        if ON_GPU  # a second a row in the interpreter
        else [(4500, "tied", False), (1100, "peaked", False), (1100, "flat", True), (1100, "tied", True)],
    )
    def test_what_is_kept_is_what_the_oracle_keeps(
        self, vocab: int, kind: str, few: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Several programs a row; with room for a few tokens most rows are left to the search by one program."""
        if few:
            monkeypatch.setattr(ops, "CANDIDATES", 64)
        asked = [*oracle.LIMITS.values(), SamplingParams(top_k=3000, top_p=0.7), SamplingParams(top_k=3)]
        logits = np.stack([oracle.ROWS[kind](vocab, number) for number in range(len(asked))])
        found = kept(asked, logits, monkeypatch)
        for row, (params, ids) in enumerate(zip(asked, found, strict=True)):
            if (params.top_k or 0) < vocab and params is not oracle.LIMITS["temp1"]:
                assert np.array_equal(ids, oracle.kept(logits[row], params)), params

    @pytest.mark.parametrize("name", oracle.EDGES)
    def test_edges(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, params, expected = oracle.EDGES[name]
        rows = Rows([sequence(params, [1], [], seed) for seed in range(4)], len(logits))
        tokens = rows.draw(np.tile(np.array(logits, dtype=np.float32), (4, 1))).tokens.tolist()
        assert set(tokens) <= set(expected or [-1])
        if not params.greedy and expected and any((params.top_k, (params.top_p or 1) < 1, params.min_p)):
            found = kept([params], np.array([logits], dtype=np.float32), monkeypatch)
            assert found[0].tolist() == expected or (params.top_k or 0) >= len(logits)

    def test_penalties_know_what_the_steps_before_have_said(self) -> None:
        """Several steps without a word from the host."""
        params = SamplingParams(
            repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.4, top_p=1.0
        )
        vocab, said = 1500, [7, 8]
        rows = Rows([sequence(params, said, [], 5)], vocab)
        logits = np.random.default_rng(1).standard_normal((1, vocab)).astype(np.float32)
        logits[0, 1490:] += 60.0
        output: list[int] = []
        for _ in range(12):
            token = int(rows.draw(logits, [2 + len(output)]).tokens[0])
            row = oracle.processed(logits[0], params, said, output)
            assert token == oracle.draw(row, params, 5, 2 + len(output))
            output.append(token)
        assert len(set(output)) < len(output)

    def test_bad_words_of_several_tokens(self) -> None:
        """The prompt's tokens count, too; a word is banned as soon as all but its last token were said."""
        vocab = 1200
        words = ((4,), (7, 8, 9), (8, 1100), (30, 31, 32), (10**6,), (8, 10**6), (10**6, 7))
        rows = Rows([sequence(SamplingParams(), [6, 7], [], 5, bad_ids=words)], vocab)
        logits = np.zeros((1, vocab), dtype=np.float32)
        output: list[int] = []
        for favourite in (4, 8, 9, 8, 1100, 30, 31, 32):
            logits[:] = 0
            logits[0, favourite] = 9.0
            token = int(rows.draw(logits, [2 + len(output)]).tokens[0])
            banned = oracle.bad_tokens(list(words), [6, 7, *output])
            assert token == (0 if favourite in banned else favourite)
            output.append(token if favourite in banned else favourite)

    def test_an_output_does_not_end_too_early(self) -> None:
        rows = Rows([sequence(SamplingParams(), [6, 7], [], 5, min_tokens=3, stop_ids=(11,))], 64)
        logits = np.zeros((1, 64), dtype=np.float32)
        logits[0, 1], logits[0, 11], logits[0, 20] = 5.0, 4.0, 3.0
        assert [int(rows.draw(logits, [place]).tokens[0]) for place in (2, 3, 4, 5)] == [20, 20, 20, 1]

    def test_a_mask_leaves_what_it_allows(self) -> None:
        vocab, rows = 1300, Rows([sequence(each, [1], [], 3) for each in KINDS[:5]], 1300)
        logits = np.random.default_rng(0).standard_normal((5, vocab)).astype(np.float32)
        bits = np.zeros(-(-vocab // 32) * 32, dtype=bool)
        bits[[3, 1024, 1299]] = True
        rows.sampling.tables.integers[:4, FLAGS] |= MASKED
        words = np.packbits(bits, bitorder="little").view(np.int32)
        rows.sampling.tables.allowed[:] = torch.from_numpy(words).to(DEVICE)
        masked = np.where(bits[:vocab], logits, -np.inf)
        expected = [oracle.draw(masked[row], KINDS[row], 3, 1) for row in range(4)]
        tokens = rows.draw(logits).tokens.tolist()
        assert tokens[:4] == expected and tokens[4] == oracle.draw(logits[4], KINDS[4], 3, 1)

    def test_rows_without_a_finite_logit_are_alone(self) -> None:
        params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=4), SamplingParams()]
        rows = Rows([sequence(each, [1, 2], [], 3) for each in params], 100)
        logits = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
        logits[1], logits[2] = np.nan, -np.inf
        logits[3, 50], logits[3, 51] = np.nan, np.inf
        tokens = rows.draw(logits).tokens.tolist()
        assert tokens[1:] == [-1, -1, 51] and tokens[0] == logits[0].argmax()

    @pytest.mark.skipif(INTERPRETED, reason="hundreds of thousands of draws")
    @pytest.mark.parametrize("vocab", [50_257, 256_000])
    @pytest.mark.parametrize("row", oracle.ROWS)
    @pytest.mark.parametrize("limit", ["temp1", "topk", "topp", "all"])
    def test_draws_are_distributed_as_asked(self, row: str, limit: str, vocab: int) -> None:
        """Chi-square and total variation; where every token is rare, of groups of them."""
        logits, params = oracle.ROWS[row](vocab, 3), oracle.LIMITS[limit]
        tokens, expected = draws(logits, params, 100_000), oracle.probabilities(logits, params)
        if (expected * len(tokens) >= 5).sum() > 1:
            oracle.check_distribution(tokens, expected)
        if (expected > 0).sum() > 1000:
            oracle.check_groups(tokens, expected)

    def test_unlikely_tokens_are_drawn(self) -> None:
        """Noise of 24 bits would miss them."""
        params = oracle.LIMITS["temp1"]
        seed, token, position, *_ = oracle.RARE
        row = oracle.rare()
        rows = Rows([sequence(params, [1], [], seed)], len(row))
        assert rows.draw(row[None], [position]).tokens.tolist() == [token]
        if ON_GPU:
            logits = oracle.tail(20_000)
            oracle.check_tail(draws(logits, params, 400_000), oracle.probabilities(logits, params))

    def test_who_leaves_no_token_out_needs_two_kernels(self) -> None:
        """And draws what all of them draw, also when others of its kind are noted in the tables."""
        kinds = [
            SamplingParams(),
            SamplingParams(top_p=1.0),
            SamplingParams(temperature=0.3, top_p=1.0),
            SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, top_p=1.0),
            SamplingParams(top_k=1),
            SamplingParams(top_k=1, presence_penalty=2.0),
            SamplingParams(temperature=0.0, top_p=0.5, min_p=0.2),
            SamplingParams(logit_bias=((5, 4.0), (9, -math.inf)), top_p=1.0),
        ]
        vocab, chance = 1100, np.random.default_rng(5)
        asked = [*({} for _ in kinds[1:]), {"bad_ids": ((7,),), "return_log_probs": True}]
        sequences = [
            [sequence(params, [1, 2], [3, 3], 7 + row, **asked[row]) for row, params in enumerate(kinds)]
            for _ in range(2)
        ]
        assert not any(each.searches for each in sequences[0])
        brief, whole = (Rows(each, vocab) for each in sequences)
        for step in range(4):
            logits = oracle.bfloat16(chance.standard_normal((len(kinds), vocab)).astype(np.float32) * 3)
            places = [4 + step] * len(kinds)
            some, every = brief.draw(logits, places, searches=False), whole.draw(logits, places)
            assert torch.equal(some.tokens, every.tokens)
            assert some.log_probs[-1] == every.log_probs[-1]
        for params, more in (
            (SamplingParams(top_k=7), {}),
            (SamplingParams(top_p=0.9), {}),
            (SamplingParams(min_p=0.1), {}),
            (SamplingParams(top_k=1), {"bad_ids": ((5, 6),)}),
            (SamplingParams(), {"top_log_probs": 1, "return_log_probs": True}),
        ):
            assert sequence(params, [1], [], 3, **more).searches

    def test_a_row_is_drawn_the_same_in_every_company(self) -> None:
        """Alone, and among others, whatever these ask for."""
        vocab, kinds, copies = (50_257, KINDS, 6) if ON_GPU else (1100, KINDS[1:4], 1)
        logits = np.stack([oracle.peaked(vocab, number) for number in range(len(kinds))])
        made = [sequence(params, [1, 2], [3], 40 + number) for number, params in enumerate(kinds)]
        alone = [
            int(Rows([each], vocab).draw(logits[number : number + 1]).tokens[0])
            for number, each in enumerate(made)
        ]
        assert Rows(made * copies, vocab).draw(np.tile(logits, (copies, 1))).tokens.tolist() == alone * copies
        others = [sequence(params, [9], [], 7) for params in kinds[1:] + kinds[:1]]
        mixed = [each for pair in zip(made, others, strict=True) for each in pair]
        assert Rows(mixed, vocab).draw(logits.repeat(2, axis=0)).tokens.tolist()[::2] == alone

    def test_the_distribution_is_the_asked_one(self) -> None:
        """A few draws, for the interpreter's sake: that each is the oracle's is shown above."""
        logits = np.random.default_rng(3).normal(0, 0.3, 12).astype(np.float32)
        tokens = draws(logits, oracle.LIMITS["temp1"], 120, batch=60)
        oracle.check_distribution(tokens, oracle.probabilities(logits, oracle.LIMITS["temp1"]))

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(RequestError, match="1025 bad words of several tokens: on a GPU it may have 1024"):
            DeviceSampling.check(sequence(SamplingParams(), [1], [], 1, bad_ids=((2, 3),) * 1025))

    def test_both_engines_say_the_same(self, tmp_path: Path) -> None:
        """All kinds in one batch, with lag, chunks, and more requests than slots: the CPU's engine is the witness, and
        on a GPU other batches, chunks and preemption are, too."""
        folder = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=LAYERS)
        settings = {"num_kv_blocks": 64, "max_seq_len": 256, "max_batch_size": 4, "max_num_tokens": 16}

        def said(**where: object) -> list[tuple]:
            config = EngineConfig(model_dir=str(folder), compute_dtype="float32", **{**settings, **where})  # type: ignore[arg-type]
            engine = Engine(config)
            requests = [
                GenerationRequest(
                    [5 + number, 6, 7, 8],
                    6 if ON_GPU else 2,
                    sampling=SamplingParams(**{**vars(params), "seed": number}),
                    end_id=-1,
                    return_log_probs=number % 2 == 0,
                )
                for number, params in enumerate(KINDS)
            ]
            requests.append(
                GenerationRequest(list(range(20, 60)), 3, sampling=SamplingParams(top_p=1.0, seed=9))
            )
            answers = [(output.token_ids, output.text) for output in engine.generate(requests)]
            engine.audit()
            if "num_kv_blocks" in where:
                assert engine.scheduler.num_preemptions > 0
            return answers

        cuda = {"kernels": "cuda", "device": DEVICE.type}
        expected = said(kernels="pytorch", device="cpu", num_threads=1)
        assert said(**cuda) == expected
        if ON_GPU:
            assert said(**cuda, max_batch_size=16, max_num_tokens=256) == expected
            tight = {"num_kv_blocks": 12, "block_size": 4, "max_seq_len": 48, "max_batch_size": 8}
            assert said(**cuda, **tight, batch_scheduler_policy="max_utilization") == expected

    def test_a_prompts_token_that_chooses_nothing_says_nothing(self, tmp_path: Path) -> None:
        """Beside three decodes the budget leaves a prompt one token a step: nothing must be drawn from these."""
        folder = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=LAYERS)
        heavy = SamplingParams(repetition_penalty=3.0, frequency_penalty=9.0)
        drawn = [SamplingParams(top_p=1.0, seed=number) for number in range(3)]
        requests = [GenerationRequest([5], 8, params, end_id=-1) for params in drawn]
        requests.append(GenerationRequest([30] * 6, 4, heavy, bad_ids=((40, 41, 42),), end_id=-1))

        def said(**where: object) -> list[list[int]]:
            engine = Engine(
                EngineConfig(
                    model_dir=str(folder), compute_dtype="float32", num_kv_blocks=32, max_seq_len=64,
                    max_batch_size=4, max_num_tokens=4, **where,  # type: ignore[arg-type]
                )
            )  # fmt: skip
            return [output.token_ids for output in engine.generate(requests)]

        assert said(kernels="cuda", device=DEVICE.type) == said(
            kernels="pytorch", device="cpu", num_threads=1
        )

    def test_forks_are_what_their_slots_will_be(self) -> None:
        """As if the sequence had got the slot with these tokens."""
        heavy = SamplingParams(
            repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, top_p=0.8, top_k=9
        )
        words = (*((5, number, 7) for number in range(40)), (9,))
        before, said = [20, 5, 3, 900], (5, 3, 3, 1099)
        made = [
            sequence(heavy, [1] * 60, [*before, *said[:count]], 4, bad_ids=words, min_tokens=9)
            for count in range(5)
        ]
        forked, plain = (DeviceSampling(5, 1100, DEVICE) for _ in range(2))
        forked.assign(0, made[0])
        forked.flush()
        forked.fork([(0, count, 64, said[:count]) for count in range(1, 5)])
        for count, each in enumerate(made):
            plain.assign(count, each)
        plain.flush()
        for name, table in vars(plain.tables).items():
            assert torch.equal(getattr(forked.tables, name), table), name

    @torch.inference_mode()
    def test_rows_of_guesses_and_what_is_kept_of_their_forks(self, parrot: Path) -> None:
        """Of three guesses so many are right: the slot knows what the fork of the last token knows."""
        settings = {"num_kv_blocks": 8, "max_seq_len": 64, "max_batch_size": 4, "speculation_tokens": 3}
        where = {"kernels": "cuda", "device": DEVICE.type}
        runner = Engine(EngineConfig(str(parrot), compute_dtype="float32", **settings, **where)).runner  # type: ignore[arg-type]
        one = sequence(SamplingParams(frequency_penalty=0.5), [5] * 4, [6, 7], 4, min_tokens=4)
        runner._slots[one] = 0
        tables = runner.sampling.tables
        for accepted, knows in ((0, 0), (1, 5), (2, 6), (3, 7)):
            rows = runner._guessed(Chunk(one, 4, True, (8, 9, 3)), (7, 0, 5, 1), 1)
            if accepted == 0:
                assert rows == [(8, 0, 6, 1), (9, 0, 7, 0), (3, 0, 8, 0)]
            assert runner._forked[0].slots == [5, 6, 7]
            tables.integers[:, FLAGS] = COUNTED
            tables.counts[:] = torch.arange(len(tables.counts), dtype=torch.int16, device=DEVICE)[:, None]
            one.tokens += [9] * (accepted + 1)
            runner._join()
            assert tables.counts[0].tolist() == [knows] * tables.counts.shape[1]
            assert not runner._forked

    def test_guesses_know_what_is_said_before_them(self, parrot: Path) -> None:
        """Penalties and bad words of several tokens."""
        heavy = SamplingParams(frequency_penalty=0.1, repetition_penalty=1.02, temperature=0.1, seed=3)

        def said(**where: object) -> tuple[Engine, list[int]]:
            settings = {"num_kv_blocks": 8, "block_size": 16, "max_seq_len": 64, "max_batch_size": 1}
            engine = Engine(EngineConfig(str(parrot), compute_dtype="float32", **settings, **where))  # type: ignore[arg-type]
            if engine.scheduler.speculation is not None:
                eager(engine)
            request = GenerationRequest([8, 7] * 8, 12, heavy, end_id=-1, bad_ids=((8, 7, 8, 9),))
            return engine, engine.generate([request])[0].token_ids

        engine, ours = said(kernels="cuda", device=DEVICE.type, speculation_tokens=3)
        assert ours == said(kernels="pytorch", device="cpu", num_threads=1)[1]
        assert engine.stats.accepted_tokens > 1

    def test_only_who_asks_is_told_log_probabilities(self, tmp_path: Path) -> None:
        folder = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=LAYERS)
        engine = Engine(
            EngineConfig(
                model_dir=str(folder), compute_dtype="float32", num_kv_blocks=32,
                max_seq_len=64, max_batch_size=4, kernels="cuda", device=DEVICE.type,
            )
        )  # fmt: skip
        tell = {"return_log_probs": True, "top_log_probs": 2}
        first, second = [GenerationRequest([5, number], 4, end_id=-1, **tell) for number in (6, 7)]  # type: ignore[arg-type]
        assert all(output.cum_log_prob < 0 for output in engine.generate([first, second]))
        silent, told = engine.generate([GenerationRequest([5, 8], 4, end_id=-1), first])
        assert silent.cum_log_prob == 0.0 and not silent.log_probs and not silent.top_log_probs
        assert told.cum_log_prob < 0 and [len(top) for top in told.top_log_probs] == [2] * 4
