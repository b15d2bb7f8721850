"""One request among sixteen fails at each stage: it gets an error, and the others the answers that they always get."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flightline.torch_engine import runner
from flightline.torch_engine.core.request import Code, FinishReason, GenerationRequest, RequestOutput
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.text import stream as text
from tests.torch_engine.test_engine import PROMPT, run

COUNT, UNLUCKY, AFTER = 16, 7, 3
"""Requests, the one that fails, and tokens that it has when it does."""


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest([*PROMPT, 60 + number], 12, end_id=-1, stop=(b"never said",), return_log_probs=True)
        for number in range(COUNT)
    ]


class Broken(Exception):
    pass


def break_sample(patch: pytest.MonkeyPatch) -> None:
    real = runner.sample

    def sample(logits, rows, *rest):
        sequences = [row.sequence for row in rows]
        if any(sequence.key == UNLUCKY and sequence.num_generated >= AFTER for sequence in sequences):
            logits[:] = 0.0  # it fails with the work half done
            raise Broken("sample")
        return real(logits, rows, *rest)

    patch.setattr(runner, "sample", sample)


def breaks(owner: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes a method fail where it works for the unlucky one."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)

        def method(self, *arguments):
            sequence = UNLUCKY_ONE.get(id(self))
            if sequence is not None and sequence.num_generated >= AFTER:
                raise Broken(name)
            return real(self, *arguments)

        patch.setattr(owner, name, method)

    return apply


UNLUCKY_ONE: dict[int, Sequence] = {}
"""The unlucky sequence, by the identity of itself and of what it owns."""

STAGES = {
    "sample": break_sample,
    "append": breaks(Sequence, "append"),
    "text": breaks(text.TextStream, "push"),
    "stop matching": breaks(text.TextStream, "_match"),
    "output": breaks(Sequence, "_tell"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("speculation", [0, 3])
def test_a_failure_ends_the_request_that_it_concerns(
    make_engine, monkeypatch: pytest.MonkeyPatch, stage: str, speculation: int
) -> None:
    engine: Engine = make_engine(speculation_tokens=speculation)
    expected = engine.generate(requests())
    for number, request in enumerate(requests()):
        engine.add(number, request)
    unlucky = engine.sequences[UNLUCKY]
    monkeypatch.setitem(UNLUCKY_ONE, id(unlucky), unlucky)
    monkeypatch.setitem(UNLUCKY_ONE, id(unlucky.output.text), unlucky)
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        whole = run(engine)
    failed = whole.pop(UNLUCKY)
    assert failed.finish_reason is FinishReason.ERROR and failed.error.code is Code.INTERNAL
    assert "Broken" in failed.error.message
    assert failed.token_ids == expected[UNLUCKY].token_ids[: len(failed.token_ids)]
    assert {number: told(output) for number, output in whole.items()} == {
        number: told(output) for number, output in enumerate(expected) if number != UNLUCKY
    }
    assert engine.failed_steps == 0
    assert [told(output) for output in engine.generate(requests())] == [told(output) for output in expected]


def told(output: RequestOutput) -> tuple:
    """All but what a batch of another size changes in the last bits."""
    assert len(output.log_probs) == len(output.token_ids) == output.num_output_tokens
    return output.token_ids, output.text, output.finish_reason, output.error


def test_a_step_that_fails_for_all_is_a_failed_step(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", None)
        for number in range(2):
            engine.add(number, requests()[number])
        whole = run(engine)
        assert all(output.error.code is Code.INTERNAL for output in whole.values())
        assert engine.failed_steps == 1
    engine.generate(requests()[:1])
    assert engine.failed_steps == 0


def test_a_request_that_cannot_begin_leaves_nothing(make_engine) -> None:
    engine: Engine = make_engine()
    with pytest.raises(TypeError):
        engine.add("odd", GenerationRequest(PROMPT, 4, stop=5))  # type: ignore[arg-type]
    assert not engine.busy
    assert len(engine.generate(requests()[:1])[0].token_ids) == 12
