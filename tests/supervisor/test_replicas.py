"""Several engines behind one server: requests spread, are found again, and survive the loss of an engine."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from flightline.supervisor.engine_process import share
from flightline.supervisor.serve import ServeError, Server, ready_message
from tests.model_repository import endpoints
from tests.model_repository.endpoints import Call, GrpcError, ask, idle, stop, wait_until
from tests.serving import CONTEXT, WATCHFUL, build_tiny, serving, settings_for

ENGINES, STREAMS = 2, 8
AFTER = 20
"""Responses after which a stream has outlived what was on its way when an engine died."""
LONG = {"text_input": "the dog", "max_tokens": CONTEXT - 100, "end_id": -1, "stream": True}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the server says."""
    return []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Iterator[Server]:
    """Two engines of the tiny model."""
    build = build_tiny(tmp_path_factory.mktemp("pair"), dp=ENGINES)
    with serving(settings_for(build, baseline=False, **WATCHFUL), lines.append) as server:
        yield server


def active(server: Server) -> list[int]:
    """Requests in each engine."""
    return [engine.stats.active_requests for engine in server.engine.engines]


def streams(server: Server, endpoint: str) -> dict[str, Call]:
    """Long streams of which each has begun."""
    calls = {str(number): Call(server, endpoint, LONG, request_id=str(number)) for number in range(STREAMS)}
    for call in calls.values():
        call.next()
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation"])
def test_streams_spread_and_end_wherever_they_are(pair: Server, endpoint: str) -> None:
    wait_until(lambda: idle(pair))
    before = pair.engine.stats.generated_tokens
    calls = streams(pair, endpoint)
    wait_until(lambda: sum(active(pair)) >= STREAMS)
    # Each instance of a model counts for itself, so two of them may differ by one each; a probe may be there too.
    assert min(active(pair)) >= STREAMS // ENGINES - 2
    for request_id, call in calls.items():
        if endpoint == "ensemble":
            stop(pair, request_id)
            call.read()
        else:
            call.close()
    wait_until(lambda: idle(pair))
    assert 0 < pair.engine.stats.generated_tokens - before < STREAMS * LONG["max_tokens"]


DRAWN = {"seed": 2**64 - 1, "temperature": 1.2, "top_k": 0, "top_p": 0.95, "max_tokens": 24, "end_id": -1}


def drawn_by_both(server: Server) -> set[str]:
    """The answers of both engines to one seeded request, asked four times at once."""
    batch = {name: np.tile(endpoints.array(name, value), (4, 1)) for name, value in DRAWN.items()}
    batch["text_input"] = np.array([[b"the cat"]] * 4, dtype=np.object_)
    texts: set[str] = set()

    def spread() -> bool:
        """A model's process may take a moment to find an engine that was started again."""
        wait_until(lambda: idle(server))
        before = [engine.stats.generated_tokens for engine in server.engine.engines]
        texts.update(Call(server, "text_generation", batch).read().texts)
        wait_until(lambda: idle(server))
        after = [engine.stats.generated_tokens for engine in server.engine.engines]
        return all(new - old >= DRAWN["max_tokens"] for old, new in zip(before, after, strict=True))

    wait_until(spread)
    return texts


@pytest.mark.slow
def test_same_answers_as_one_engine(pair: Server, served: Server) -> None:
    alone = Call(served, "text_generation", {"text_input": "the cat", **DRAWN}).read().text
    assert drawn_by_both(pair) == {alone}
    expected = ask(served, "text_generation", "the cat", 24, end_id=-1).text
    for endpoint in ("ensemble", "text_generation"):
        assert {ask(pair, endpoint, "the cat", 24, end_id=-1).text for _ in range(4)} == {expected}


@pytest.mark.slow
def test_a_conversation_stays_with_its_engine(pair: Server) -> None:
    """Whichever instance of the model it comes to; three of them, so that taking turns would not do it."""
    wait_until(lambda: idle(pair))
    said = [f"{number} and the dog " * 30 for number in range(3)]
    for turn in range(6):
        for number, text in enumerate(said):
            answer = ask(
                pair, "text_generation", text, 4, return_num_input_tokens=True, return_perf_metrics=True
            )
            blocks = answer.last("num_input_tokens") // pair.engine.stats.tokens_per_block
            reused = answer.last("kv_cache_reused_blocks")
            assert reused >= blocks - 4 if turn else reused == 0
            said[number] = f"{text}{answer.text} and then? "


@pytest.mark.slow
def test_a_common_beginning_does_not_bring_all_to_one_engine(pair: Server) -> None:
    wait_until(lambda: idle(pair))
    common = LONG | {"text_input": "you are a helpful dog " * 20, "max_tokens": CONTEXT - 1000}
    ask(pair, "text_generation", common["text_input"])
    calls = [Call(pair, "text_generation", common) for _ in range(STREAMS)]
    for call in calls:
        call.next()
    wait_until(lambda: sum(active(pair)) >= STREAMS)
    assert min(active(pair)) >= STREAMS // ENGINES - 2
    for call in calls:
        call.close()
    wait_until(lambda: idle(pair))


@pytest.mark.slow
def test_a_batch_spreads_too(pair: Server) -> None:
    wait_until(lambda: idle(pair))
    rows, tokens = 4, 500  # so many that none has ended before all are handed over
    texts = np.array([[b"the dog"]] * rows, dtype=np.object_)
    lengths = np.array([[tokens]] * rows, dtype=np.int32)
    ends = np.array([[-1]] * rows, dtype=np.int32)
    before = [engine.stats.generated_tokens for engine in pair.engine.engines]
    answer = Call(
        pair, "text_generation", {"text_input": texts, "max_tokens": lengths, "end_id": ends}
    ).read()
    assert len(answer.responses) == rows
    wait_until(lambda: idle(pair))
    after = [engine.stats.generated_tokens for engine in pair.engine.engines]
    # Two each, or three and one where a question whether the model is there came between.
    assert all(new - old >= tokens for old, new in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_user_is_told_how_many_there_are(pair: Server) -> None:
    assert f"{ENGINES} engines, each LlamaForCausalLM" in ready_message(pair)


@pytest.mark.slow
def test_metrics_are_sums(pair: Server) -> None:
    blocks = pair.engine.stats.kv_blocks_max
    assert blocks == ENGINES * pair.engine.engines[0].stats.kv_blocks_max > 0
    ask(pair, "ensemble")

    def shown() -> str:
        with urllib.request.urlopen(f"{pair.settings.metrics_url}/metrics") as page:
            return page.read().decode()

    line = f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="max",model="tensorrt_llm",version="1"}} {blocks}'
    wait_until(lambda: line in shown())


@pytest.mark.slow
def test_the_loss_of_an_engine(pair: Server, lines: list[str]) -> None:
    wait_until(lambda: pair.wait_ready(0.1) and idle(pair))
    drawn = drawn_by_both(pair)
    first, second = pair.engine_pids
    calls = streams(pair, "text_generation")
    psutil.Process(first).kill()
    wait_until(lambda: not pair.engine.connected)
    assert ask(pair, "text_generation").text, "the other engine answers"
    lost = kept = 0
    for call in calls.values():
        try:
            call.skip()  # it may have said a lot before the engine ended
            for _ in range(AFTER):
                call.next()
            call.close()
            kept += 1
        except GrpcError as error:
            assert "the engine process ended while this request was in flight" in str(error)
            lost += 1
    assert lost >= 1 and kept >= 1 and lost + kept == STREAMS
    wait_until(lambda: pair.engine.connected and pair.wait_ready(0.1))
    assert pair.engine_pids[0] != first and pair.engine_pids[1] == second
    assert drawn_by_both(pair) == drawn, "the new one draws what the old one drew"
    assert any(line.startswith("engine process 1 of 2 was ended by SIGKILL: restarting it") for line in lines)


@pytest.mark.slow
def test_a_frozen_instance_is_noticed_though_the_other_answers(pair: Server, lines: list[str]) -> None:
    """Others of the same model go on answering and the engines have work, so the server as a whole is never silent."""
    wait_until(lambda: pair.wait_ready(0.1) and idle(pair))
    old = pair.triton_pid
    traffic = streams(pair, "ensemble")
    stubs = [
        stub for stub in psutil.Process(old).children() if "/text_generation/" in " ".join(stub.cmdline())
    ]
    assert len(stubs) == ENGINES
    stubs[0].suspend()
    wait_until(lambda: pair.triton_pid != old)
    wait_until(lambda: pair.wait_ready(0.1))
    # By Triton, which sees that its stub is not there; by a later question that has overtaken one; or, where a busy
    # machine answers no later one in time, by the engines, which answer all the same.
    noticed = ("model text_generation is dead", "an instance of model text_generation has left")
    noticed += ("model text_generation has not answered",)
    assert any(line.startswith(noticed) for line in lines)
    assert ask(pair, "text_generation").text
    for call in traffic.values():
        call.close()


@pytest.mark.slow
def test_a_frozen_engine_is_noticed_though_the_other_answers(pair: Server, lines: list[str]) -> None:
    wait_until(lambda: pair.engine.connected and pair.wait_ready(0.1))
    first, second = pair.engine_pids
    psutil.Process(second).suspend()
    wait_until(lambda: pair.engine_pids[1] != second)
    wait_until(lambda: pair.engine.connected and pair.wait_ready(0.1))
    assert pair.engine_pids[0] == first
    assert "engine process 2 of 2 has stopped answering: restarting it" in lines
    wait_until(lambda: idle(pair))


def test_each_engine_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(n, 2, "cuda").env["CUDA_VISIBLE_DEVICES"] for n in range(2)] == ["0", "1"]
    assert [share(n, 2, "cuda", 2).env["CUDA_VISIBLE_DEVICES"] for n in range(2)] == ["0,1", "2,3"]
    assert "CUDA_VISIBLE_DEVICES" not in share(0, 1, "cuda").env
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3f2")
    assert [share(n, 2, "cuda").env["CUDA_VISIBLE_DEVICES"] for n in range(2)] == ["5", "GPU-3f2"]
    with pytest.raises(ServeError, match=r"shows 2 GPU\(s\), and 3 engines were built \(DP=3\)"):
        share(0, 3, "cuda")


def test_engines_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 4, 6, 8})
    assert share(0, 1, "cpu").cores == frozenset()
    parts = [share(number, 2, "cpu").cores for number in range(2)]
    assert parts == [{0, 2}, {4, 6, 8}]
