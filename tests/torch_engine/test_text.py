"""Streamed text: every cut of every stream concatenates to the same valid text, and stop words never leak."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from flightline.torch_engine.text.stream import TextStream, TokenBytes, UnsupportedTokenizer
from tests.tiny import tiny_checkpoint

TEXTS = [
    "the quick brown fox",
    "  two leading spaces and a trailing one ",
    "emoji 👩‍👩‍👧‍👦 flags 🇨🇭 and a skin tone 👍🏽",
    "汉字かな交じり文と한국어",
    "combining: e\u0301 n\u0303 Z\u0351\u036b\u0343",
    "عربى and עברית",
    "line\nbreaks\r\n\ttabs",
]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), tokenizer=request.param)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> TokenBytes:
    return TokenBytes.from_dir(folder)


def stream(tokens: TokenBytes, ids: list[int], stop: tuple[bytes, ...] = ()) -> tuple[list[str], list[int]]:
    """The released texts and ids; checks what every release promises."""
    text, texts, released = TextStream(tokens, stop), [], []
    for token_id in ids:
        release = text.push(token_id)
        assert tokens.decode(release.token_ids) == release.text
        texts.append(release.text)
        released += release.token_ids
        if release.stopped:
            break
    else:
        release = text.finish()
        assert tokens.decode(release.token_ids) == release.text
        texts.append(release.text)
        released += release.token_ids
    assert at_once(tokens, ids, stop) == ("".join(texts), released)
    return texts, released


def at_once(tokens: TokenBytes, ids: list[int], stop: tuple[bytes, ...]) -> tuple[str, list[int]]:
    """What a stream that is told at its end releases."""
    text = TextStream(tokens, stop, whole=True)
    for token_id in ids:
        release = text.push(token_id)
        if release.stopped:
            break
        assert not release.token_ids and not release.text
    else:
        release = text.finish()
    return release.text, release.token_ids


@pytest.mark.parametrize("text", TEXTS)
def test_streams_concatenate_to_the_text(folder: Path, tokens: TokenBytes, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    texts, released = stream(tokens, ids)
    assert "".join(texts) == text == tokens.decode(ids)
    assert released == ids
    assert "\ufffd" not in "".join(texts)
    assert tokenizer.decode(ids).strip() == text.strip()


def test_random_tokens_stream_like_they_decode_in_one_go(tokens: TokenBytes) -> None:
    chance = random.Random(1)
    for _ in range(300):
        ids = [chance.randrange(len(tokens)) for _ in range(chance.randrange(1, 40))]
        texts, released = stream(tokens, ids)
        assert "".join(texts) == tokens.decode(ids)
        assert released == ids


def test_tokens_are_released_as_soon_as_their_text_is_whole(tokens: TokenBytes) -> None:
    emoji = tokens.spell("😀".encode())
    assert len(emoji) == 4
    text = TextStream(tokens)
    assert [text.push(token).text for token in emoji] == ["", "", "", "😀"]
    assert text.num_held == 0
    letter = tokens.spell(b"a")[0]
    text.push(emoji[0])
    assert text.push(letter).text == "\ufffda", "a lead byte that never completes is not waited for"


def test_stop_words_never_leak_whatever_tokens_they_span(tokens: TokenBytes) -> None:
    chance = random.Random(2)
    alphabet = "ab"
    for _ in range(500):
        text = "".join(chance.choice(alphabet) for _ in range(30))
        words = tuple(
            "".join(chance.choice(alphabet) for _ in range(chance.randrange(2, 7))) for _ in range(2)
        )
        ids = [token for char in text for token in tokens.spell(char.encode())]
        texts, released = stream(tokens, ids, tuple(word.encode() for word in words))
        found = [at for word in words if (at := text.find(word)) >= 0]
        # Generation goes on token by token, so the word that is complete first wins.
        ends = sorted((text.find(word) + len(word), text.find(word)) for word in words if word in text)
        expected = text if not found else text[: min(start for end, start in ends if end == ends[0][0])]
        assert "".join(texts) == expected
        assert tokens.decode(released) == expected


def test_a_stop_word_inside_a_token_cuts_the_token(tokens: TokenBytes) -> None:
    token = next(
        index for index in range(3, len(tokens)) if tokens[index].strip().isalpha() and len(tokens[index]) > 2
    )
    word = tokens[token]
    texts, released = stream(tokens, [token], (word[1:],))
    assert "".join(texts) == word[:1].decode() == tokens.decode(released)


def test_what_may_become_a_stop_word_waits_and_comes_out_if_it_does_not(tokens: TokenBytes) -> None:
    ids = [token for char in "xST" for token in tokens.spell(char.encode())]
    text = TextStream(tokens, (b"STOP",))
    assert [text.push(token).text for token in ids] == ["x", "", ""]
    assert text.finish().text == "ST"


def test_special_tokens_have_no_text(tokens: TokenBytes) -> None:
    assert tokens[0] == tokens[1] == tokens[2] == b""
    assert tokens[10**6] == b"" and tokens[-1] == b""


def test_other_decoders_are_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import decoders, models

    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedTokenizer, match="WordPiece"):
        TokenBytes.from_dir(tmp_path)
    with pytest.raises(UnsupportedTokenizer, match="does not exist"):
        TokenBytes.from_dir(tmp_path / "nowhere")
