from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core.request import RequestError
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


def test_a_word_of_no_tokens_is_refused(tmp_path: Path) -> None:
    """A vocabulary without control characters, like that of SmolLM2; taken for a word, it would end the engine."""
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "<pad>": 2, "▁": 3, "a": 4}, merges=[]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    save_tokenizer(tokenizer, tmp_path)
    vocabulary = Vocabulary(tmp_path)
    assert vocabulary.bad_ids("a", spaced=True) == [[4]]
    with pytest.raises(RequestError, match=r"bad_words holds '\\x04', which no tokens of this model spell"):
        vocabulary.bad_ids("\x04", spaced=True)
    with pytest.raises(RequestError, match="stop_words holds"):
        vocabulary.stop_ids("\x04")


def test_no_prompt_longer_than_the_longest_tokens_can_fit(vocabulary: Vocabulary) -> None:
    longest = max(len(vocabulary.bytes[token]) for token in range(len(vocabulary.bytes)))
    assert vocabulary.most_bytes(100) == 100 * max(longest, len("</s>"))
