"""Where NVIDIA's models and ours answer the same tensors differently.

``ensemble``, ``preprocessing``, ``tensorrt_llm``, ``postprocessing`` and ``tensorrt_llm_bls`` follow NVIDIA's
``inflight_batcher_llm`` to the letter, because their clients do; ``text_generation`` (and the baseline, which is
compared with it) has the defaults that a user without such a client expects. Sources: ``all_models`` and the clients
of TensorRT-LLM 1.0 to 1.2, ``inflight_batcher_llm/src/model_instance_state.cc`` of the backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Contract:
    """The habits of one endpoint."""

    exclude_input: bool
    """What ``exclude_input_in_output`` is when it is left out."""
    prompt_in_streams: bool
    """Whether the prompt comes before a streamed answer that does not exclude it."""
    unknown_parameters: bool
    """Whether request parameters that nobody knows pass. Over HTTP each misspelled input is one."""
    json_words: bool
    """Whether a stop or bad word that is a JSON list of strings stands for the strings in it."""
    spaced_bad_words: bool
    """Whether a bad word is also banned where it follows a space."""
    counts_so_far: bool
    """Whether ``num_output_tokens`` counts all tokens up to a response. NVIDIA's counts the tokens that the response
    itself holds, those of a prompt that is not excluded too."""
    flat_text: bool
    """Whether ``text_output`` is [1] instead of [1, 1]: NVIDIA's postprocessing drops the batch dimension."""
    stop_is_an_error: bool = False
    """Whether an order to stop is itself answered with CANCELLED, and not with a response without outputs."""


NVIDIA = Contract(
    exclude_input=False,
    prompt_in_streams=False,
    unknown_parameters=True,
    json_words=False,
    spaced_bad_words=False,
    counts_so_far=False,
    flat_text=True,
)
OURS = Contract(
    exclude_input=True,
    prompt_in_streams=True,
    unknown_parameters=False,
    json_words=True,
    spaced_bad_words=True,
    counts_so_far=True,
    flat_text=False,
)
LLMAPI = replace(NVIDIA, stop_is_an_error=True)
"""Of ``all_models/llmapi``, the contract that TensorRT-LLM kept after 1.2."""
