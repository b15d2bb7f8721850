from __future__ import annotations

import json

import pytest

from flightline.loadtest.commands import main
from flightline.loadtest.options import BenchOptions, CompareOptions, SearchOptions
from flightline.loadtest.prompts import FIRST_OF_WARM_UP, PER_WORKER, Prompts, generate
from flightline.settings import SettingsError, load


def test_command_line_before_environment_before_default(monkeypatch):
    monkeypatch.setenv("CONCURRENCY", "4")
    monkeypatch.setenv("OUTPUT_TOKENS", "32")
    monkeypatch.setenv("SEED", "")
    options = load(BenchOptions, "bench", ["--concurrency", "8"])
    assert (options.concurrency, options.output_tokens, options.seed) == (8, "32", 0)


def test_the_precision_of_a_build_is_not_that_of_a_search(monkeypatch):
    monkeypatch.setenv("PRECISION", "fp8")
    assert load(SearchOptions, "search", []).precision == 0.1
    monkeypatch.setenv("SEARCH_PRECISION", "0.5")
    assert load(SearchOptions, "search", []).precision == 0.5
    with pytest.raises(SettingsError, match=r"SEARCH_PRECISION='2' is not valid"):
        load(SearchOptions, "search", ["--precision", "2"])


def test_bench_is_a_comparison_with_settings_of_its_own(tmp_path):
    given = ["--concurrency", "8", "--seed", "3", "--reports", str(tmp_path), "--assert", "ratio>=6"]
    compared = load(BenchOptions, "bench", given).compared()
    arms = [
        "--arms",
        "hf_baseline, text_generation",
        "--levels",
        "8",
        "--output-tokens",
        "64",
        "--calibrate-s",
        "0",
    ]
    rounds = ["--rounds", "5", "--full-rounds", "1", "--stretch", "1", "--budget-s", "330"]
    assert compared == load(CompareOptions, "compare", [*given[2:], *arms, *rounds])


def test_the_first_run_takes_longer_unless_a_budget_is_given(tmp_path):
    def budget_s(*more: str) -> float:
        return load(BenchOptions, "bench", ["--reports", str(tmp_path), *more]).compared().budget_s

    first = budget_s()
    assert budget_s("--budget-s", "20") == 20
    (tmp_path / "a-sweep").mkdir()
    (tmp_path / "a-sweep" / "summary.png").touch()
    after_a_sweep = budget_s()
    (tmp_path / "a-bench").mkdir()
    (tmp_path / "a-bench" / "comparison.png").touch()
    assert (first, after_a_sweep, budget_s()) == (330, 330, 160)


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
    assert main("bench", arguments) == 2
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
    with pytest.raises(SettingsError, match="line 2"):
        Prompts(file=str(bad))
