"""KV blocks behind sliding windows are given back, and what has no room goes to host memory: no token changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flightline.torch_engine.core.config import ConfigError
from flightline.torch_engine.core.layer_groups import LayerGroups, most_blocks
from flightline.torch_engine.core.request import Code, GenerationRequest
from flightline.torch_engine.core.speculation import MARGIN, Speculation
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.kernels.cpu.toolchain import compiler
from tests.tiny import tiny_checkpoint

NATIVE = pytest.param("native", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))
WINDOW = 8
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of five layers have a window: five groups of one layer."""
    kinds = [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "sliding")]
    return tiny_checkpoint(
        tmp_path_factory.mktemp("windows"),
        "gemma3",
        num_hidden_layers=5,
        sliding_window=WINDOW,
        layer_types=kinds,
    )


def prompt(length: int, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 250) for _ in range(length)]


def plain(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    """What is right, of an engine that has all the memory that it wants."""
    return [output.token_ids for output in engine.generate(requests)]


def answers(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    """All in flight together, the books audited after each step."""
    tokens: list[list[int]] = [[] for _ in requests]
    for number, request in enumerate(requests):
        engine.add(number, request)
    while engine.busy:
        for number, output in engine.step():
            assert output.error is None
            tokens[number] += output.token_ids
        engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return tokens


# Windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "size", "expected"),
    [
        ([None] * 4, 4, (None,)),
        ([16] * 4, 4, (16,)),
        ([16, None] * 3, 3, (None, 16)),
        ([16] * 5 + [None], 1, (None, *[16] * 5)),
        (
            ([16] * 5 + [None]) * 5 + [16] * 4,
            5,
            (None, *[16] * 6),
        ),  # 29 windows: one place of the last is empty
        ([None, 4, 8], 1, (None, 4, 8)),
    ],
)
def test_layers_are_grouped_by_window(windows: list[Any], size: int, expected: tuple[Any, ...]) -> None:
    groups = LayerGroups.of(windows)
    assert (groups.size, groups.windows) == (size, expected)
    assert [groups.windows[group] for group in groups.groups] == windows
    where = list(zip(groups.groups, groups.places, strict=True))
    assert len(set(where)) == len(windows) and max(groups.places) < size


def test_what_a_sequence_takes_is_bounded_by_its_windows() -> None:
    """Gemma 3 12B: 8 of 48 layers keep all of 131,072 tokens, the others 1,024 and what a step computes."""
    groups = LayerGroups.of(([1024] * 5 + [None]) * 8)
    whole = groups.most_whole(131_072, 2048, 16)
    assert whole == -(-(8192 + 5 * (-(-(1023 + 127 + 2048) // 16) + 2)) * 8 // 48)
    assert whole < 131_072 // 16 / 5
    assert most_blocks([None], 131_072, 2048, 16) == 8192


@pytest.mark.parametrize("kernels", ["pytorch", NATIVE])
@pytest.mark.parametrize(
    ("policy", "reuse"),
    [("guaranteed_no_evict", True), ("max_utilization", True), ("max_utilization", False)],
)
def test_tokens_stay_what_they_are(
    make_engine: MakeEngine, folder: Path, library: str, kernels: str, policy: str, reuse: bool
) -> None:
    """Prompts shorter and longer than the window and the budget, in too little memory; then once more."""
    settings = {
        "kernels": kernels, "kernel_dir": library, "max_seq_len": 182, "max_num_tokens": 64,
        "enable_kv_cache_reuse": reuse,
    }  # fmt: skip
    lengths = (3, 20, 90, 91, 150, 40, 80, 80, 80)
    requests = [GenerationRequest(prompt(length, length), 30, end_id=-1) for length in lengths]
    requests.append(GenerationRequest([*prompt(150, 150)[:120], 7, 8, 9], 30, end_id=-1))
    expected = plain(make_engine(folder, num_kv_blocks=512, free_behind_windows=False, **settings), requests)
    engine = make_engine(folder, num_kv_blocks=46, batch_scheduler_policy=policy, **settings)
    assert len(engine.blocks.windows) == 5
    for _ in range(2):
        assert answers(engine, requests) == expected
    assert reuse or not engine.stats.kv_blocks_reused
    assert policy == "max_utilization" or engine.scheduler.num_preemptions == 0


def test_blocks_behind_the_window_are_free_while_the_request_runs(
    make_engine: MakeEngine, folder: Path
) -> None:
    engine = make_engine(folder, num_kv_blocks=64, max_seq_len=256)
    engine.add("x", GenerationRequest(prompt(200), 40, end_id=-1))
    most = 0
    while engine.busy:
        engine.step()
        used = engine.blocks.num_blocks - engine.blocks.num_free
        length = engine.sequences["x"].num_computed if engine.busy else 0
        most = max(most, length)
        assert used <= most_blocks(engine.blocks.windows, length, 16, 4, stride=1)
    assert most > 230
    assert most_blocks(engine.blocks.windows, 239, 16, 4, stride=1) == 60 + 4 * 8


def test_a_sequence_fits_whose_windows_are_all_that_does(make_engine: MakeEngine, folder: Path) -> None:
    """50 blocks hold 200 tokens in all layers, and 480 of a request's: the full layer's, and four windows."""
    engine = make_engine(folder, num_kv_blocks=60, max_seq_len=480)
    [tokens] = answers(engine, [GenerationRequest(prompt(460), 20, end_id=-1)])
    whole = make_engine(folder, num_kv_blocks=120, max_seq_len=480, free_behind_windows=False)
    assert plain(whole, [GenerationRequest(prompt(460), 20, end_id=-1)]) == [tokens]
    with pytest.raises(ConfigError, match=r"max_seq_len=480 needs 120 blocks of 4"):
        make_engine(folder, num_kv_blocks=60, max_seq_len=480, free_behind_windows=False)


def test_a_long_conversation_goes_on_from_its_last_window(make_engine: MakeEngine, folder: Path) -> None:
    engine = make_engine(folder, num_kv_blocks=100, max_seq_len=400)
    first = prompt(300)
    [said] = answers(engine, [GenerationRequest(first, 20, end_id=-1)])
    [output] = engine.generate([GenerationRequest([*first, *said, 5, 6], 4, end_id=-1)])
    assert output.metrics.num_cached_tokens == (300 + 20 - 1) // 4 * 4
    whole = make_engine(folder, num_kv_blocks=120, max_seq_len=400, free_behind_windows=False)
    assert (
        whole.generate([GenerationRequest([*first, *said, 5, 6], 4, end_id=-1)])[0].token_ids
        == output.token_ids
    )


def test_siblings_start_where_the_window_still_reaches(make_engine: MakeEngine, folder: Path) -> None:
    for reuse in (True, False):
        engine = make_engine(folder, num_kv_blocks=100, max_seq_len=200, enable_kv_cache_reuse=reuse)
        group = [GenerationRequest(prompt(90), 12, end_id=-1, group="g") for _ in range(3)]
        tokens = answers(engine, group)
        assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("reuse", [True, False])
def test_requests_that_come_and_go_lose_no_block(make_engine: MakeEngine, folder: Path, reuse: bool) -> None:
    chance = random.Random(7)
    engine = make_engine(
        folder, num_kv_blocks=40, max_seq_len=160, batch_scheduler_policy="max_utilization",
        enable_kv_cache_reuse=reuse, num_host_kv_blocks=20 * reuse, max_num_tokens=64,
    )  # fmt: skip
    for number in range(150):
        if chance.random() < 0.5:
            tokens = prompt(chance.randrange(1, 60), chance.randrange(3))
            engine.add(number, GenerationRequest(tokens, chance.randrange(20, 100), end_id=-1))
        if engine.sequences and chance.random() < 0.08:
            engine.cancel(chance.choice(list(engine.sequences)))
        engine.step()
        engine.audit()
    for key in list(engine.sequences):
        engine.cancel(key)
    engine.audit()
    assert engine.scheduler.num_preemptions > 0
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max


def test_guesses_that_were_wrong_find_their_window(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rejected guess a sequence is shorter than it was, and sees further back."""
    parrot = tiny_checkpoint(tmp_path, "mistral", sliding_window=WINDOW)
    tensors = load_file(parrot / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 0.35
        if name == "lm_head.weight":
            tensor[12:] = 0
    save_file(tensors, parrot / "model.safetensors", {"format": "pt"})
    settings = {"num_kv_blocks": 60, "max_num_tokens": 48}
    requests = [GenerationRequest([8, 7, 9, seed] * 6, 60, end_id=-1) for seed in range(3, 7)]
    expected = plain(make_engine(parrot, free_behind_windows=False, **settings), requests)
    engine = make_engine(parrot, speculation_tokens=4, **settings)
    engine.scheduler.speculation = Speculation(4, 0.01, MARGIN / 100)
    assert answers(engine, requests) == expected
    assert engine.stats.guessed_tokens > engine.stats.accepted_tokens > 10


@pytest.mark.parametrize("kernels", ["pytorch", NATIVE])
def test_nobody_reads_behind_a_window(
    make_engine: MakeEngine, folder: Path, library: str, kernels: str
) -> None:
    """What was there may be another request's by now, and that may be broken."""
    settings = {"kernels": kernels, "kernel_dir": library, "max_seq_len": 256}
    requests = [GenerationRequest(prompt(length, 3), 20, end_id=-1) for length in (120, 150)]
    expected = plain(make_engine(folder, num_kv_blocks=512, **settings), requests)
    engine = make_engine(folder, num_kv_blocks=512, **settings)
    bad = engine.blocks.allocate(3)[-1]
    with torch.inference_mode():
        for cache in engine.runner.caches:
            for tensor in engine.kernels.cache_tensors(cache):
                tensor[bad] = torch.nan
    steps, build = engine.runner.steps, engine.runner.steps.build
    poisoned = 0

    def build_poisoned(chunks: list[Any]) -> Any:
        nonlocal poisoned
        for sequence, (row, _, _) in steps._known.items():
            for group, left in enumerate(sequence.num_left):
                steps._tables[row, group, :left] = bad
                poisoned += left
        return build(chunks)

    steps.build = build_poisoned
    tokens: list[list[int]] = [[], []]
    for number, request in enumerate(requests):
        engine.add(number, request)
    while engine.busy:
        for number, output in engine.step():
            tokens[number] += output.token_ids
    assert tokens == expected and poisoned > 100


# Host memory -------------------------------------------------------------------------------------


def conversations(engine: Engine, count: int = 4, turns: int = 3, say: Any = answers) -> list[list[int]]:
    """Each waits for the others before it goes on, so that its beginning has had to make room for theirs."""
    texts = [prompt(40, number) for number in range(count)]
    for turn in range(turns):
        for number, text in enumerate(texts):
            [said] = say(engine, [GenerationRequest(text, 8, end_id=-1)])
            texts[number] = [*text, *said, 5 + turn, 6]
    return texts


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("windows", [True, False])
def test_what_has_no_room_comes_back_from_host_memory(
    make_engine: MakeEngine, folder: Path, llama_dir: Path, kind: str, windows: bool
) -> None:
    model = folder if windows else llama_dir
    settings = {"kv_dtype": kind, "max_seq_len": 100, "max_num_tokens": 64}
    expected = conversations(make_engine(model, num_kv_blocks=512, **settings), say=plain)
    settings["num_kv_blocks"] = 26 if windows else 40
    alone = make_engine(model, **settings)
    assert conversations(alone) == expected
    engine = make_engine(model, num_host_kv_blocks=100, **settings)
    assert conversations(engine) == expected
    stats = engine.stats
    assert stats.kv_blocks_reused > alone.stats.kv_blocks_reused
    assert stats.host_kv_hits > 2
    assert stats.host_kv_bytes_max >= stats.host_kv_bytes_used > 0
    assert stats.host_kv_bytes_saved > 0 and stats.host_kv_bytes_restored > 0
    assert alone.stats.host_kv_hits == alone.stats.host_kv_bytes_max == 0
    assert "KV blocks in host memory" in engine.info.description


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_compiled_kernels_find_it_again(
    make_engine: MakeEngine, folder: Path, library: str, precision: str
) -> None:
    settings = {
        "kernels": "native", "kernel_dir": library, "weight_precision": precision, "max_seq_len": 100,
    }  # fmt: skip
    expected = conversations(make_engine(folder, num_kv_blocks=512, **settings), 3, 4, plain)
    engine = make_engine(folder, num_kv_blocks=26, num_host_kv_blocks=100, **settings)
    assert conversations(engine, 3, 4) == expected
    assert engine.stats.host_kv_hits > 0


def test_a_small_host_memory_changes_no_token(make_engine: MakeEngine, llama_dir: Path) -> None:
    expected = conversations(make_engine(llama_dir, num_kv_blocks=512), say=plain)
    for host in (1, 3, 17):
        engine = make_engine(llama_dir, num_kv_blocks=33, num_host_kv_blocks=host)
        assert conversations(engine) == expected


def test_copies_that_fail_end_the_requests_that_need_them(
    make_engine: MakeEngine, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama_dir, num_kv_blocks=33, num_host_kv_blocks=100)
    first, second = prompt(60, 1), prompt(60, 2)
    [said] = answers(engine, [GenerationRequest(first, 8, end_id=-1)])
    answers(engine, [GenerationRequest(second, 60, end_id=-1)])
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.host, "move", lambda moves: 1 / 0)
        engine.add("x", GenerationRequest(first, 8, end_id=-1))
        [(_, output)] = engine.step()
    assert output.error.code is Code.INTERNAL and "KV blocks could not be copied" in output.error.message
    engine.audit()
    before = engine.blocks.num_reused
    assert answers(engine, [GenerationRequest(first, 8, end_id=-1)]) == [said]
    assert engine.blocks.num_reused == before, "nobody knows what the blocks hold"


def test_host_memory_that_is_not_there_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(MemoryError, match=r"num_host_kv_blocks=.*lower HOST_KV_GIB"):
        make_engine(num_host_kv_blocks=2**31 - 2, block_size=64)
