"""Log-probabilities of a prompt's own tokens: Transformers', however it is computed and whoever is beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flightline.torch_engine.core import scheduler
from flightline.torch_engine.core.request import GenerationRequest, RequestOutput, SamplingParams
from flightline.torch_engine.engine import Engine
from tests.torch_engine.test_engine import run

Make = Callable[..., Engine]
PROMPTS = [
    [7 + (number * step) % 90 for number in range(count)]
    for count, step in ((45, 7), (33, 5), (1, 1), (2, 3))
]
MOST = 3


@pytest.fixture(scope="module")
def exact(llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()


def asked(prompt: list[int], **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt, 2, **{"end_id": -1, "return_prompt_log_probs": True, "top_log_probs": MOST, **fields}
    )


@torch.inference_mode()
def require_right(exact: Any, prompt: list[int], output: RequestOutput) -> None:
    expected = exact(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    own = expected[torch.arange(len(prompt) - 1), prompt[1:]]
    np.testing.assert_allclose(output.prompt_log_probs, own.numpy(), atol=2e-5)
    assert [len(top) for top in output.prompt_top_log_probs] == [MOST] * (len(prompt) - 1)
    for row, top in zip(expected, output.prompt_top_log_probs, strict=True):
        np.testing.assert_allclose([value for _, value in top], row.topk(MOST).values.numpy(), atol=2e-5)
        np.testing.assert_allclose(
            row[[token for token, _ in top]].numpy(), [value for _, value in top], atol=2e-5
        )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings", [
    {},
    {"max_num_tokens": 7, "max_batch_size": 4},
    {"max_num_tokens": 128, "enable_chunked_context": False},
    {"max_num_tokens": 48, "num_kv_blocks": 24, "max_seq_len": 96, "batch_scheduler_policy": "max_utilization"},
])  # fmt: skip
def test_they_are_transformers(
    make_engine: Make, library: str, exact: Any, compiled: bool, settings: dict
) -> None:
    """In pieces and whole, with a full cache, preempted, beside others, again and again."""
    if compiled and not library:
        pytest.skip("no C++ compiler")
    kernels = {"kernel_dir": library, "kernels": "native"} if compiled else {"kernels": "pytorch"}
    engine = make_engine(**settings, **kernels)
    plain = [GenerationRequest(prompt, 6, SamplingParams(top_p=1.0, seed=4), end_id=-1) for prompt in PROMPTS]
    alone = [output.token_ids for output in engine.generate(plain)]
    for _ in range(2):
        for number, prompt in enumerate(PROMPTS):
            engine.add(("plain", number), plain[number])
            engine.add(("asked", number), asked(prompt))
        outputs = run(engine)
        for number, prompt in enumerate(PROMPTS):
            require_right(exact, prompt, outputs["asked", number])
            assert outputs["plain", number].token_ids == alone[number]
            assert outputs["asked", number].token_ids == engine.generate([asked(prompt)])[0].token_ids
            assert outputs["plain", number].prompt_log_probs == []


def test_a_step_has_only_so_many_and_others_do_not_wait(
    make_engine: Make, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts that are asked about take turns, and a short question behind them is answered at once."""
    monkeypatch.setattr(scheduler, "MOST_SCORED", 4)
    engine = make_engine(max_num_tokens=64)
    most, launch = [], engine.runner.launch

    def watched(chunks: list, sampling: list) -> Any:
        most.append(sum(chunk.scored for chunk in chunks))
        return launch(chunks, sampling)

    monkeypatch.setattr(engine.runner, "launch", watched)
    for number in (0, 1):
        engine.add(number, asked(PROMPTS[number]))
    engine.add("short", GenerationRequest([5, 6, 7], 2, end_id=-1))
    early = [key for _ in range(3) for key, _ in engine.step()]
    assert set(early) == {"short"}
    outputs = run(engine)
    assert max(most) == 4 and sum(most) == len(PROMPTS[0]) + len(PROMPTS[1]) - 2
    for number in (0, 1):
        require_right(exact, PROMPTS[number], outputs[number])


def test_every_answer_to_a_prompt_is_told(make_engine: Make, exact: Any) -> None:
    for output in make_engine().generate(asked(PROMPTS[1], sampling=SamplingParams(top_p=1.0)).siblings(3)):
        require_right(exact, PROMPTS[1], output)
