from __future__ import annotations

import json

import pytest

from loadtest.bench import main
from loadtest.config import BenchConfig, ConfigError
from loadtest.prompts import FIRST_OF_WARM_UP, PER_WORKER, Prompts, generate


def test_command_line_before_environment_before_default(monkeypatch):
    monkeypatch.setenv("CONCURRENCY", "4")
    monkeypatch.setenv("OUTPUT_TOKENS", "32")
    monkeypatch.setenv("SEED", "")
    config = BenchConfig.from_arguments(["--concurrency", "8"])
    assert (config.concurrency, config.output_tokens, config.seed) == (8, 32, 0)


def test_the_first_run_takes_longer_unless_a_budget_is_given(tmp_path):
    reports = ["--reports", str(tmp_path)]
    first = BenchConfig.from_arguments(reports).with_budget()
    assert BenchConfig.from_arguments([*reports, "--budget-s", "20"]).with_budget().budget_s == 20
    (tmp_path / "a-sweep").mkdir()
    (tmp_path / "a-sweep" / "summary.png").touch()
    after_a_sweep = BenchConfig.from_arguments(reports).with_budget()
    (tmp_path / "a-bench").mkdir()
    (tmp_path / "a-bench" / "comparison.png").touch()
    again = BenchConfig.from_arguments(reports).with_budget()
    assert (first.budget_s, after_a_sweep.budget_s, again.budget_s) == (330, 330, 160)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "0"],
        ["--concurrency", "many"],
        ["--output-tokens", "1"],
        ["--budget-s", "-1"],
        ["--seed", "1.5"],
        ["--candidate", "gpt"],
        ["--baseline", "text_generation"],
        ["--prompts", "no-such-file"],
    ],
)
def test_impossible_settings_are_one_line_that_names_them(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "CANDIDATE" if "baseline" in arguments[0] else arguments[0][2:].replace("-", "_").upper()
    assert line.startswith("error: ") and name in line


def test_prompts_are_unique_reproducible_and_chat_sized():
    prompts = [generate(7, index) for index in range(50_000)]
    first_block = {prompt[:16] for prompt in prompts}  # even of a vocabulary of single characters
    warm_up = {generate(7, FIRST_OF_WARM_UP + index)[:16] for index in range(1000)}
    other_worker = {generate(7, PER_WORKER + index)[:16] for index in range(1000)}
    assert len(first_block | warm_up | other_worker) == 52_000  # no prefix that a cache could reuse
    assert prompts[:10] == [generate(7, index) for index in range(10)]
    assert prompts[0] != generate(8, 0)
    words = sorted(len(prompt.split()) for prompt in prompts)
    assert words[0] >= 15 and words[-1] <= 60


def test_prompt_files(tmp_path):
    text, lines, bad = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    text.write_text("one\n\ntwo\n")
    lines.write_text('{"prompt": "one"}\n' + json.dumps({"text_input": "z\u00e9"}))
    bad.write_text('{"prompt": "one"}\n{"prompt": 5}\n')
    assert [Prompts(file=str(text))[i] for i in range(3)] == ["one", "two", "one"]
    assert Prompts(file=str(lines))[1] == "z\u00e9"
    with pytest.raises(ConfigError, match="line 2"):
        Prompts(file=str(bad))
