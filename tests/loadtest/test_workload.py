from __future__ import annotations

import json

import numpy as np
import pytest

from flightline.loadtest.workload import PRESETS, Workload, WorkloadSpec, conversation, read_trace
from flightline.settings import SettingsError


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "prefix"])
def test_prompts_are_unique_from_the_first_words_and_reproducible(name):
    workload, again = (Workload.of(WorkloadSpec(name, seed=5)) for _ in range(2))
    prompts = [workload[i].prompt for i in range(500)]
    assert len({prompt[:60] for prompt in prompts}) == 500
    assert [workload[i] for i in range(20)] == [again[i] for i in range(20)]
    assert workload[0] != Workload.of(WorkloadSpec(name, seed=6))[0]


def test_lengths_are_those_that_were_asked_for():
    fixed = Workload.of(WorkloadSpec(input_tokens="100", output_tokens="7"))
    assert {len(fixed[i].prompt.split()) for i in range(50)} == {100}
    assert {fixed[i].output_tokens for i in range(50)} == {7}
    spread = Workload.of(WorkloadSpec(input_tokens="lognormal:200:0.5<=400", output_tokens="uniform:10:20"))
    inputs = [len(spread[i].prompt.split()) for i in range(2000)]
    assert np.median(inputs) == pytest.approx(200, rel=0.05) and max(inputs) == 400
    outputs = [spread[i].output_tokens for i in range(2000)]
    assert (min(outputs), max(outputs)) == (10, 20)


def test_shared_prefixes_are_shared_and_declared():
    workload = Workload.of(WorkloadSpec("prefix"))
    heads = {workload[i].prompt[:200] for i in range(200)}
    assert len(heads) == 4 and workload.shares_prefixes
    assert len({workload[i].prompt for i in range(200)}) == 200
    assert not Workload.of(WorkloadSpec("chat")).shares_prefixes


def test_a_conversation_sends_all_that_was_said():
    talk = conversation(Workload.of(WorkloadSpec("turns", turns=3)), 7)
    first = next(talk).prompt
    second = talk.send("the answer").prompt
    assert second.startswith(first + "the answer\n") and len(second) > len(first) + 20
    talk.send("more")
    with pytest.raises(StopIteration):
        talk.send("end")


@pytest.mark.parametrize("spec", [{"name": "poetry"}, {"output_tokens": "0"}, {"output_tokens": "1.5"},
                                  {"input_tokens": "uniform:9:3"}, {"input_tokens": "normal:5"}])  # fmt: skip
def test_a_workload_that_cannot_be_is_told(spec):
    with pytest.raises(SettingsError, match="is not valid"):
        Workload.of(WorkloadSpec(**spec))


def test_traces_are_read_in_the_order_of_their_times(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 1000, "input_length": 700, "output_length": 6, "hash_ids": [1, 3]},
        {"at_s": 2, "prompt": "Hello", "max_tokens": 3},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_trace(path)
    assert [row.at_s for row in read] == [0.0, 1.0, 2.0]
    assert [row.ask.output_tokens for row in read] == [6, 3, 5]
    assert read[1].ask.prompt == "Hello"
    assert [len(read[i].ask.prompt.split()) for i in (0, 2)] == [700, 600]
    a, b = (read[i].ask.prompt.split() for i in (0, 2))
    assert (
        a[:512] == b[:512] and a[512:600] != b[512:600]
    )  # the block that both have, and those that they do not


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"timestamp": 1}', "line 2: it has no output_length"),
        ('{"timestamp": -1, "output_length": 4, "prompt": "x"}', "timestamp is -1"),
        ('{"timestamp": 1, "output_length": 4, "prompt": 5}', "prompt is 5"),
        ('{"timestamp": 1, "output_length": 0, "prompt": "x"}', "output_length is 0"),
        ('{"at_s": "soon", "output_length": 4, "prompt": "x"}', "at_s is 'soon'"),
    ],
)
def test_a_malformed_trace_names_the_line(tmp_path, line, why):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "output_length": 4, "prompt": "x"}\n' + line + "\n")
    with pytest.raises(SettingsError, match=why):
        read_trace(path)
