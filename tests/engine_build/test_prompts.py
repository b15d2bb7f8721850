"""Prompt files: every malformed line is named by its number."""

from __future__ import annotations

from pathlib import Path

import pytest

from flightline.engine_build.build import CALIBRATION, GATE_PROMPTS, GATE_TEXT
from flightline.engine_build.errors import BuildError
from flightline.engine_build.prompts import read_prompts

GOOD = '{"prompt": "a"}\n' * 7


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '["prompt"]',
        '{"question": "a"}',
        '{"prompt": "a", "text": "b"}',
        '{"prompt": 3}',
        '{"text": "  "}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "wizard", "content": "a"}]}',
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"prompts\.jsonl:9: ") as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_all_three_kinds(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    path.write_text(GOOD + '{"text": "plain"}\n' + chat, encoding="utf-8")
    samples = read_prompts(path)
    assert [sample.wants_answer for sample in samples] == [True] * 7 + [False, False]


def test_too_few(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(BuildError, match=r"has 7 samples.*at least 8"):
        read_prompts(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match="cannot be read"):
        read_prompts(path)


def test_what_ships() -> None:
    calibration, gate = read_prompts(CALIBRATION), read_prompts(GATE_PROMPTS)
    assert len(calibration) >= 64
    assert not [sample for sample in gate if sample in calibration]
    assert len(GATE_TEXT.read_text(encoding="utf-8").split()) > 4000
