from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors

from model_repository.shared.vocabulary import Vocabulary
from tests.tiny import byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer

KINDS = {"byte_level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}
WORDS = ["dog", " dog", "\n\n", "END", "日本", "👩‍🚀", "é", "a token"]


@pytest.fixture(params=KINDS)
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    tokenizer = KINDS[request.param]()
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = bos
    save_tokenizer(tokenizer, tmp_path)
    return Vocabulary(tmp_path)


@pytest.mark.parametrize("word", WORDS)
def test_stop_words_are_spelled_exactly(vocabulary: Vocabulary, word: str) -> None:
    assert vocabulary.stops([word]) == ((word.encode(),), ())
    assert vocabulary.bytes.bytes_of(vocabulary.stop_ids(word)) == word.encode()


def test_a_prompt_gets_one_bos(vocabulary: Vocabulary) -> None:
    plain = vocabulary.encode_prompt("the dog")
    assert plain[0] == vocabulary.bos_id
    assert plain.count(vocabulary.bos_id) == 1
    assert vocabulary.encode_prompt("<s>the dog") == plain


def test_special_tokens_as_stop_words(vocabulary: Vocabulary) -> None:
    """They have no text to look for; their ids end the output."""
    assert vocabulary.stops(["</s>", "dog", "<pad>"]) == ((b"dog",), (1, 2))
    assert vocabulary.stop_ids("<pad>") == [2]


def test_bad_words_have_no_bos_and_cover_the_word_after_a_space(vocabulary: Vocabulary) -> None:
    spelled = [vocabulary.bytes.bytes_of(ids) for ids in vocabulary.bad_ids("dog", spaced=True)]
    assert b"dog" in spelled
    assert len(spelled) == 1 or b" dog" in spelled
    assert all(vocabulary.bos_id not in ids for ids in vocabulary.bad_ids("dog", spaced=True))
