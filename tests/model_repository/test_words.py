from __future__ import annotations

import json

import numpy as np
import pytest

from flightline.model_repository.shared import words


def test_example_of_the_contract() -> None:
    packed = words.pack([[[5, 6], [7]]])
    assert packed.dtype == np.int32
    assert packed.tolist() == [[[5, 6, 7], [2, 3, -1]]]


def test_no_words_have_no_width() -> None:
    assert words.pack([[], []]).shape == (2, 2, 0)


def test_rows_of_different_length_survive_the_round_trip() -> None:
    rows = [[[5, 6], [7]], [], [[1], [2], [3, 4, 5]]]
    assert [words.unpack(row) for row in words.pack(rows)] == rows


@pytest.mark.parametrize("ends", [[4, -1, -1], [2, 1, -1], [2, 2, -1]])
def test_impossible_ends_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing end offsets of at most 3"):
        words.unpack(np.array([[5, 6, 7], ends]))


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ([b""], []),
        ([b"END"], ["END"]),
        ([b'["a", "b c"]'], ["a", "b c"]),
        ([b"a", b"", b"b"], ["a", "b"]),
        ([b"[INST]"], ["[INST]"]),
        ([b"[1, 2]"], ["[1, 2]"]),
        (["é".encode()], ["é"]),
    ],
)
def test_spellings_of_words(elements: list[bytes], expected: list[str]) -> None:
    assert words.parse(elements, json_lists=True) == expected


def test_nvidia_takes_a_word_as_it_stands() -> None:
    assert words.parse([b'["a", "b"]', b"", b"c"], json_lists=False) == ['["a", "b"]', "c"]


def test_words_must_be_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        words.parse([b"\xff"], json_lists=True)


@pytest.mark.parametrize("element", [b"[" * 1000, b"[" * 10_000])
def test_a_thousand_brackets_are_a_word(element: bytes) -> None:
    assert words.parse([element], json_lists=True) == [element.decode()]


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([b"a"] * 1025, "has 1025 words: at most 1024 are allowed"),
        ([json.dumps(["a"] * 1025).encode()], "has 1025 words: at most 1024 are allowed"),
        ([b"a" * 16_000, b"b" * 385], "has 16385 bytes: at most 16384 are allowed"),
    ],
)
def test_words_have_caps(elements: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.parse(elements, json_lists=True)
    assert words.parse([b"a"] * 1024, json_lists=True) == ["a"] * 1024


def test_token_lists_have_caps() -> None:
    with pytest.raises(ValueError, match="has 65537 tokens: at most 65536 are allowed"):
        words.unpack(np.zeros((2, 65_537), np.int32))
    with pytest.raises(ValueError, match="has 4097 words: at most 4096 are allowed"):
        words.unpack(np.stack([np.ones(4097, np.int32), np.arange(1, 4098, dtype=np.int32)]))
