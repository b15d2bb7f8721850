"""Prompts and answers are what Transformers makes of the same files: BPE, byte-fallback SentencePiece, Unigram."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from flightline.model_repository.shared import vocabulary as vocabulary_module
from flightline.model_repository.shared.vocabulary import Vocabulary
from tests.tiny import BOS, CORPUS, EOS, PAD, byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer
from tests.torch_engine.test_text import TEXTS

PROMPTS = [
    *TEXTS,
    *CORPUS,
    "",
    " ",
    "   three   spaces   between   ",
    "▁▁ a stand-in of its own ▁",
    "a</s>b<pad> <s> specials in the text",
    "control \x00\x04\x7f\u200b\ufeff and \ufffd",
    "<0x41> spelled out, <0xZZ> too",
    "def f(x):\n    return [x] * 2\n\n\n",
    "1234567890 3.14159 1e-5",
    "ﬁ ligature, ½, Å and A\u030a",
    "<tool_call>{}</tool_call>",
]


def unigram_tokenizer() -> Tokenizer:
    """SentencePiece's other model, with Metaspace on both sides (T5, XLM-R) and byte fallback."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=[BOS, EOS, PAD, "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [tuple(entry) for entry in learned] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in (BOS, EOS, PAD, "<unk>")])
    return tokenizer


KINDS = {"BPE": byte_level_tokenizer, "byte fallback": sentencepiece_tokenizer, "Unigram": unigram_tokenizer}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With all that the files of the field have: runs of spaces as tokens, a cut and padding left from training."""
    tokenizer = KINDS[request.param]()
    space = " " if request.param == "BPE" else "▁"
    tokenizer.add_tokens([AddedToken(space * count, normalized=False) for count in (2, 3, 4)])
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("\n\n", normalized=False)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=24, pad_id=2, pad_token=PAD)
    save_tokenizer(tokenizer, tmp_path)
    return tmp_path


def test_prompts_and_texts_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = Vocabulary(folder), AutoTokenizer.from_pretrained(folder)
    letter = ours.bytes.spell(b"a")
    for text in PROMPTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == ids, text
        # Behind a token, as an answer is: decoders take spaces away at the beginning of a text.
        expected = theirs.decode(letter + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.bytes.decode(letter + ids).removeprefix(" ") == expected.removeprefix(" "), text


def test_every_token_has_the_text_that_transformers_gives_it(folder: Path) -> None:
    """Between two others, so that nothing at either end is stripped."""
    ours, theirs = Vocabulary(folder).bytes, AutoTokenizer.from_pretrained(folder)
    (letter,) = ours.spell(b"a")
    for token in range(len(ours)):
        if ours.text_of(token) is not None:
            ids = [letter, token, letter]
            expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert ours.decode(ids).removeprefix(" ") == expected.removeprefix(" "), token


def test_a_byte_piece_is_a_byte_only_where_the_decoder_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<0x41>": 0, "<0xZZ>": 1, "▁a": 2}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    save_tokenizer(tokenizer, tmp_path)
    assert Vocabulary(tmp_path).bytes.decode([0, 1, 2]) == tokenizer.decode([0, 1, 2]) == "<0x41><0xZZ> a"
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    save_tokenizer(tokenizer, tmp_path)
    assert Vocabulary(tmp_path).bytes.decode([0, 1, 2]) == tokenizer.decode([0, 1, 2]) == "A<0xZZ> a"


def test_other_threads_work_while_a_prompt_is_tokenised(folder: Path) -> None:
    """The emitter is one of them. With the interpreter locked, this one would not move at all."""
    ours, over, steps = Vocabulary(folder), threading.Event(), 0

    def work() -> None:
        nonlocal steps
        while not over.wait(0.001):
            steps += 1

    thread = threading.Thread(target=work)
    thread.start()
    text = CORPUS[0] * (2**20 // len(CORPUS[0]))
    before = steps
    ours.encode_prompt(text)
    after = steps
    over.set()
    thread.join()
    assert after - before > 20


def test_a_long_prompt_gives_its_memory_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr(vocabulary_module, "_give_memory_back", lambda: given_back.append(True))
    ours, theirs = Vocabulary(folder), AutoTokenizer.from_pretrained(folder)
    text = CORPUS[0] * (vocabulary_module.LONG_TEXT // len(CORPUS[0]) + 1)
    assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    assert given_back == [True]
    ours.encode_prompt("short")
    assert given_back == [True]
