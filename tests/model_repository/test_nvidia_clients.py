"""What NVIDIA's two client programs send, through Triton, to each backend that can be served here.

Decoupled or not, over ``tensorrt_llm``, ``ensemble`` and ``tensorrt_llm_bls``. The witness is ``text_generation`` of
backend torch, which other tests hold against Transformers.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from flightline.engine_build.build import Build
from flightline.engine_build.settings import parse
from flightline.supervisor.serve import Server
from flightline.torch_engine.text.stream import TokenBytes
from tests.model_repository.endpoints import ask, idle, post, wait_until
from tests.model_repository.nvidia import PERF_METRICS, STOP, Texts, Tokens, Wire
from tests.serving import CONTEXT, serving, settings_for, tensorrt_llm_lane

pytestmark = pytest.mark.slow

PROMPT = "the quick brown"
LENGTH = 24
TEXT_MODELS = ["ensemble", "tensorrt_llm_bls"]


@dataclass(frozen=True)
class Deployment:
    server: Server
    decoupled: bool

    accumulates: bool = False
    """``ACCUMULATE_TOKENS=1``: each text of tensorrt_llm_bls is the whole text so far."""

    def overwrites(self, model: str) -> bool:
        """Whether a client has to be told ``--overwrite-output-text``."""
        return self.accumulates and model == "tensorrt_llm_bls"

    @property
    def url(self) -> str:
        return self.server.settings.grpc_url

    @property
    def ways(self) -> list[bool]:
        """Streaming or not, as far as this one can."""
        return [False, True] if self.decoupled else [False]


@pytest.fixture(
    scope="module",
    params=[(lane, decoupled) for lane in ("torch", "trtllm-pytorch") for decoupled in (True, False)],
    ids=lambda each: f"{each[0]}-{'decoupled' if each[1] else 'at once'}",
)
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    lane, decoupled = request.param
    served: Server = request.getfixturevalue("served")
    if lane == "torch" and decoupled:
        yield Deployment(served, True)
        return
    folder = tmp_path_factory.mktemp(f"{lane}-{decoupled}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOUPLED", str(int(decoupled)))
        patch.setenv("MAX_SEQ_LEN", str(CONTEXT))
        patch.setenv("ACCUMULATE_TOKENS", str(int(decoupled)))
        if lane == "torch":
            arguments = ["--model", served.engine.info.model_dir, "--engine", "torch", "--precision", "bf16"]
            Build(parse([*arguments, "--build-dir", str(folder)]), say=print).run()
            with serving(settings_for(folder, baseline=False)) as server:
                patch.undo()  # it was for this build alone
                yield Deployment(server, decoupled, accumulates=decoupled)
        else:
            with tensorrt_llm_lane(folder, lane, baseline=False, max_position_embeddings=CONTEXT) as server:
                patch.undo()  # it was for this build alone
                yield Deployment(server, decoupled, accumulates=decoupled)


@pytest.fixture(scope="module")
def vocabulary(served: Server) -> TokenBytes:
    return TokenBytes.from_dir(served.engine.info.model_dir)


@pytest.fixture(scope="module")
def prompt(served: Server) -> list[int]:
    return encode(served, PROMPT)


@pytest.fixture(scope="module")
def answer(served: Server) -> str:
    return ask(served, "text_generation", PROMPT, LENGTH, end_id=-1).text


def encode(served: Server, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{served.engine.info.model_dir}/tokenizer.json").encode(text).ids


# -- inflight_batcher_llm_client.py --------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [False, True])
def test_tokens(
    deployment: Deployment, prompt: list[int], answer: str, vocabulary: TokenBytes, exclude: bool
) -> None:
    """Without ``exclude_input_in_output`` theirs drops as many tokens as its prompt had."""
    for streaming in deployment.ways:
        found = Tokens.ask(
            deployment.url,
            prompt,
            decoupled=deployment.decoupled,
            streaming=streaming,
            length=LENGTH,
            exclude=exclude,
        )
        assert vocabulary.decode(found.ids) == answer
        assert len(found.ids) == LENGTH


def test_tokens_with_metrics_and_no_named_outputs(deployment: Deployment, prompt: list[int]) -> None:
    for streaming in deployment.ways:
        found = Tokens.ask(
            deployment.url,
            prompt,
            decoupled=deployment.decoupled,
            streaming=streaming,
            perf_metrics=True,
            log_probs=True,
        )
        values = {name: found.perf_metrics[name][0][0] for name in PERF_METRICS}
        stamps = [
            values[f"{name}_time_ns"] for name in ("arrival", "first_scheduled", "first_token", "last_token")
        ]
        assert stamps == sorted(stamps) and stamps[0] > 0
        assert found.cum_log_probs[0] < 0 and (found.output_log_probs[0] < 0).all()


def test_tokens_with_named_outputs(deployment: Deployment, prompt: list[int]) -> None:
    names = ("output_ids", "sequence_length", "sequence_index")
    for streaming in deployment.ways:
        found = Tokens.ask(
            deployment.url, prompt, decoupled=deployment.decoupled, streaming=streaming, names=names, length=9
        )
        assert len(found.ids) == 9


@pytest.mark.parametrize("exclude", [False, True])
def test_counts_of_tokens(deployment: Deployment, prompt: list[int], exclude: bool) -> None:
    """NVIDIA's are of one response, and of all that it holds: a prompt that is not excluded counts, too."""
    counted = np.array([[True]], np.bool_)
    for streaming in deployment.ways:
        found = Tokens.ask(
            deployment.url,
            prompt,
            decoupled=deployment.decoupled,
            streaming=streaming,
            length=LENGTH,
            exclude=exclude,
            return_num_output_tokens=counted,
        )
        whole = LENGTH if streaming or exclude else len(prompt) + LENGTH
        assert all(count == held for count, held in found.counts)
        assert sum(count for count, _ in found.counts) == whole
        for model in TEXT_MODELS:
            asked = {"end_id": -1, "exclude_input_in_output": exclude, "return_num_output_tokens": True}
            answer = ask(deployment.server, model, PROMPT, LENGTH, stream=streaming, **asked)
            assert sum(count.item() for count in answer.column("num_output_tokens")) == whole


def test_end_id(deployment: Deployment, prompt: list[int], vocabulary: TokenBytes) -> None:
    def generated(end_id: int, streaming: bool) -> list[int]:
        return Tokens.ask(
            deployment.url,
            prompt,
            decoupled=deployment.decoupled,
            streaming=streaming,
            length=LENGTH,
            end_id=end_id,
        ).ids

    for streaming in deployment.ways:
        free = generated(-1, streaming)
        end = free[5]
        ended = free[: free.index(end)]
        assert generated(end, streaming) == ended
        for model in TEXT_MODELS:
            found = Texts.ask(
                deployment.url,
                model,
                [PROMPT],
                streaming=streaming,
                length=LENGTH,
                exclude=True,
                end_id=end,
                overwrite=deployment.overwrites(model),
            )
            assert found.texts == [vocabulary.decode(ended)]


@contextmanager
def slowed(server: Server) -> Iterator[None]:
    """The engine runs for one of every sixty milliseconds: at most ten of this model's tokens on a fast machine."""
    (pid,) = server.engine_pids
    ended = threading.Event()

    def hold() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.059)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.001)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        yield
    finally:
        ended.set()
        holding.join()


def test_stop_after_200_ms(deployment: Deployment, prompt: list[int]) -> None:
    """Their order carries the request parameter ``Streaming``; what has been generated comes back."""

    def generated(streaming: bool) -> int:
        found = Tokens.ask(
            deployment.url,
            prompt,
            decoupled=deployment.decoupled,
            streaming=streaming,
            length=300,
            stop_after_s=0.2,
            request_id="stopped",
        )
        return len(found.ids)

    with slowed(deployment.server):
        for streaming in deployment.ways:
            # A busy machine may hold the wrong one of the two: an order that is not obeyed gives 300 each time.
            counts: list[int] = []
            while not counts or counts[-1] >= 60:
                assert len(counts) < 10, counts
                counts.append(generated(streaming))
    wait_until(lambda: idle(deployment.server))


def test_malformed_orders_to_stop(deployment: Deployment) -> None:
    def order(request_id: str = "x", **changes: np.ndarray) -> Wire:
        return Wire(deployment.url, "tensorrt_llm", STOP | changes, request_id=request_id)

    def send(wire: Wire) -> None:
        wire.stream() if deployment.decoupled else wire.infer()

    send(order())  # of nobody: harmless
    with pytest.raises(InferenceServerException, match="a request id must be provided"):
        send(order(request_id=""))
    rows = {name: np.repeat(value, 2, axis=0) for name, value in STOP.items()}
    rows["stop"] = np.array([[True], [False]])
    with pytest.raises(
        InferenceServerException, match=r"stop is \[True, False\]: a stop request must be true"
    ):
        send(order(**rows))


# -- end_to_end_grpc_client.py -------------------------------------------------------------------------


@pytest.mark.parametrize("model", TEXT_MODELS)
@pytest.mark.parametrize("exclude", [False, True])
def test_texts(deployment: Deployment, model: str, answer: str, exclude: bool) -> None:
    """The prompt comes back only where it is not excluded and nothing is streamed."""
    for streaming in deployment.ways:
        found = Texts.ask(
            deployment.url,
            model,
            [PROMPT],
            streaming=streaming,
            length=LENGTH,
            exclude=exclude,
            end_id=-1,
            overwrite=deployment.overwrites(model),
        )
        assert found.texts == [answer if streaming or exclude else PROMPT + answer]


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_texts_with_metrics_and_log_probs(deployment: Deployment, model: str) -> None:
    for streaming in deployment.ways:
        found = Texts.ask(
            deployment.url,
            model,
            [PROMPT],
            streaming=streaming,
            length=LENGTH,
            perf_metrics=True,
            log_probs=True,
            end_id=-1,
            overwrite=deployment.overwrites(model),
        )
        assert found.perf_metrics["last_token_time_ns"] >= found.perf_metrics["arrival_time_ns"] > 0
        assert found.perf_metrics["total_draft_tokens"] == 0
        assert (np.concatenate(found.log_probs) < 0).sum() == LENGTH


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_words(deployment: Deployment, model: str, answer: str, prompt: list[int], served: Server) -> None:
    """A word, several words, and a JSON list of words, which to NVIDIA is a word like any other."""
    word = next(word for word in re.findall(" [a-z]+", answer) if len(word) > 2)

    def text(**words: list[str]) -> str:
        """However it is asked for."""
        (found,) = {
            Texts.ask(
                deployment.url,
                model,
                [PROMPT],
                streaming=streaming,
                length=LENGTH,
                exclude=True,
                end_id=-1,
                **words,
                overwrite=deployment.overwrites(model),
            ).texts[0]
            for streaming in deployment.ways
        }
        return found

    stopped = answer[: answer.index(word)]
    assert text(stop_words=[word]) == text(stop_words=["not in there", word]) == stopped
    assert text(stop_words=[f'["{word}"]']) == answer
    assert word not in text(bad_words=[word])
    assert text(bad_words=["not in there", word]) == text(bad_words=[word])
    assert text(bad_words=[f'["{word}"]']) == answer
    # NVIDIA's bans a word as it is spelled: the same letters after a space are other tokens.
    generated = Tokens.ask(
        deployment.url, prompt, decoupled=deployment.decoupled, streaming=False, length=LENGTH
    ).ids
    bare = encode(served, word.strip())
    assert bare not in [generated[at : at + len(bare)] for at in range(LENGTH)], "choose another word"
    assert text(bad_words=[word.strip()]) == answer


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_batch_of_four(deployment: Deployment, model: str, served: Server) -> None:
    prompts = [PROMPT, "the dog", "a token is a piece", "x"]
    expected = [ask(served, "text_generation", each, LENGTH, end_id=-1).text for each in prompts]
    inputs = {"length": LENGTH, "exclude": True, "end_id": -1}
    one_by_one = Texts.ask(
        deployment.url,
        model,
        prompts,
        streaming=deployment.decoupled,
        **inputs,
        overwrite=deployment.overwrites(model),
    )
    assert one_by_one.texts == expected
    if not deployment.decoupled:
        with pytest.raises(InferenceServerException, match="a batch of 4 needs a decoupled model"):
            Texts.ask(
                deployment.url,
                model,
                prompts,
                streaming=False,
                batch=True,
                length=LENGTH,
                overwrite=deployment.overwrites(model),
            )
        return
    for streaming in deployment.ways:
        found = Texts.ask(
            deployment.url,
            model,
            prompts,
            streaming=streaming,
            batch=True,
            **inputs,
            overwrite=deployment.overwrites(model),
        )
        assert found.texts == expected


def test_accumulated_texts(deployment: Deployment, answer: str) -> None:
    """``accumulate_tokens`` of tensorrt_llm_bls, and what it is without."""
    texts = ask(
        deployment.server, "tensorrt_llm_bls", PROMPT, LENGTH, end_id=-1, stream=deployment.decoupled
    ).texts
    assert (texts[-1] if deployment.accumulates else "".join(texts)) == answer
    if deployment.accumulates:
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


# -- what only one kind of deployment does -------------------------------------------------------------


def test_streams_need_a_decoupled_model(deployment: Deployment) -> None:
    if deployment.decoupled:
        pieces = post(
            deployment.server, "ensemble", {"text_input": PROMPT, "max_tokens": 40, "stream": True}, True
        )
        assert pieces.status == 200
        return
    for model in TEXT_MODELS:
        with pytest.raises(
            InferenceServerException, match="streaming is only supported if the model is decoupled"
        ):
            Texts.ask(deployment.url, model, [PROMPT], streaming=True, overwrite=deployment.overwrites(model))


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_generate_over_http(deployment: Deployment, model: str, answer: str) -> None:
    """Fields that nobody knows are request parameters, which NVIDIA's models do not look at."""
    body = {"text_input": PROMPT, "max_tokens": LENGTH, "end_id": -1, "bad_words": "", "stop_words": ""}
    found = post(deployment.server, model, {**body, "unheard_of": 3})
    assert (found.status, found.text) == (200, PROMPT + answer)
