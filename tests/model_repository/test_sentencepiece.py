"""The other kind of tokenizer, and the baseline's static batches, on a server of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import ask, in_pieces
from tests.serving import build_tiny, serving, settings_for

pytestmark = pytest.mark.slow

BATCH = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    build = build_tiny(tmp_path_factory.mktemp("spm"), "sentencepiece", baseline_max_batch_size=BATCH)
    with serving(settings_for(build)) as running:
        yield running


@pytest.mark.parametrize("model", ["ensemble", "text_generation", "hf_baseline"])
@pytest.mark.parametrize("seed", range(2))
def test_streamed_text_is_the_whole_text(server: Server, model: str, seed: int) -> None:
    inputs = {"prompt": "a token 日本 👩‍🚀", "max_tokens": 100, "seed": seed, "end_id": -1}
    inputs |= {"temperature": 1.5, "top_k": 0, "top_p": 1.0}
    whole = ask(server, model, **inputs)
    streamed = in_pieces(server, model, 3, **inputs)
    assert streamed.text == whole.text


@pytest.mark.parametrize("model", ["ensemble", "text_generation", "hf_baseline"])
def test_stop_words_never_leak(server: Server, model: str) -> None:
    text = ask(server, model, "the dog", 60, end_id=-1).text
    parts = (text[start : start + 3] for start in range(20, len(text) - 2))
    word = next(
        part for part in parts if part.isascii() and part.isprintable()
    )  # others may be cut characters
    answer = ask(server, model, "the dog", 60, end_id=-1, stop_words=word, stream=True)
    assert answer.text == text[: text.index(word)]


def test_a_static_batch_gives_what_single_requests_give(server: Server) -> None:
    prompts = [f"{'the dog ' * index}jumps" for index in range(BATCH)]
    lengths = [5 + index for index in range(BATCH)]
    single = [
        ask(server, "text_generation", *pair, end_id=-1).text for pair in zip(prompts, lengths, strict=True)
    ]
    with ThreadPoolExecutor(BATCH) as pool:
        batch = list(
            pool.map(
                lambda pair: ask(server, "hf_baseline", *pair, end_id=-1).text,
                zip(prompts, lengths, strict=True),
            )
        )
    assert batch == single
