"""The stop-word automaton: the same finds as looking for every word, at a cost that their number does not change."""

from __future__ import annotations

import random
import sys

import pytest

from flightline.torch_engine.text.matcher import Matcher
from flightline.torch_engine.text.stream import TextStream, TokenBytes

BYTES = TokenBytes([bytes([value]) for value in range(256)])


def test_finds_what_a_search_for_every_word_finds() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        words = [
            bytes(chance.choice(b"ab") for _ in range(chance.randrange(1, 7)))
            for _ in range(chance.randrange(1, 6))
        ]
        text = bytes(chance.choice(b"abc") for _ in range(40))
        matcher = Matcher(words)
        state = matcher.start
        for end in range(1, len(text) + 1):
            state = matcher.step(state, text[end - 1])
            ended = [word for word in words if text[:end].endswith(word)]
            assert state.matched == max(map(len, ended), default=0)
            begun = [
                len(word[:n]) for word in words for n in range(len(word) + 1) if text[:end].endswith(word[:n])
            ]
            assert state.depth == max(begun)


def calls(stream: TextStream, ids: list[int]) -> int:
    """Function calls, Python's and C's, that pushing ``ids`` takes."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        for token in ids:
            assert not stream.push(token).stopped
    finally:
        sys.setprofile(None)
    return count


def test_many_stop_words_cost_a_token_what_one_costs() -> None:
    ids = [value for _ in range(20) for value in b"the quick brown fox"]
    one = calls(TextStream(BYTES, (b"word 0 that never comes",)), ids)
    words = tuple(f"word {number} that never comes".encode() for number in range(2_000))
    # A state once made is only looked up; the few that this text makes look for a byte among all words.
    assert calls(TextStream(BYTES, words), ids) < 2 * one


@pytest.mark.parametrize("stop", [(), (b"\xbb" * 5,)])
def test_characters_that_never_end_cost_no_more_for_every_one_held(stop: tuple[bytes, ...]) -> None:
    """Tokens that each end in the middle of a character: nothing can be released, whatever the number."""
    shifted = TokenBytes(["日".encode()[:2], "日".encode()[2:] + "日".encode()[:2]])
    once = calls(TextStream(shifted, stop), [0] + [1] * 100)
    assert calls(TextStream(shifted, stop), [0] + [1] * 1000) < 12 * once


def test_tokens_cut_by_a_stop_word_keep_their_values() -> None:
    tokens = TokenBytes([b"a", b"b", b"say STOP", b"sa", b"s", b"y", b" "])
    stream = TextStream(tokens, (b"STOP",), whole=True)
    stream.push(0), stream.push(1)
    release = stream.push(2)
    assert release.stopped and release.text == "absay "
    assert tokens.decode(release.token_ids) == release.text and len(release.token_ids) == 5
    assert release.told([-1.0, -2.0, -3.0], 0.0) == [-1.0, -2.0, -3.0, 0.0, 0.0]
    stream = TextStream(tokens, (b"STOP",))
    assert stream.push(0).told([-1.0], 0.0) == [-1.0]
