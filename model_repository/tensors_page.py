"""``docs/TENSORS.md``, made from the table that the models read."""

from __future__ import annotations

from pathlib import Path

from flightline.client.params import DECLARED, MOST_SEQUENCES, Declaration
from flightline.model_repository.shared import words
from flightline.model_repository.shared.responses import NO_TOKEN
from flightline.model_repository.shared.tensors import LANES, TABLE, Tensor

PAGE = Path(__file__).resolve().parents[1] / "docs/TENSORS.md"
HEAD = """# Which input works in which backend

Made from `client/params.py` and `TABLE` in `model_repository/shared/tensors.py` by
`python -m flightline.model_repository.tensors_page`; a test holds the page to them. Names are those of
NVIDIA's `ensemble`, with the other names of `preprocessing` and `tensorrt_llm`.

* **yes**: served.
* **ensemble**: by `ensemble` and `tensorrt_llm`, NVIDIA's own there; `text_generation` and `tensorrt_llm_bls`, whose
  answers are text, refuse it by name.
* **text_generation**: by that model alone; NVIDIA has no such tensor.
* **no**: refused with the name of the tensor and of the backend, unless its value asks for nothing (`beam_width` 1).
* **ignored**: NVIDIA's preprocessing sends it to every model, and one without a decoder apart does not look at it.

What goes to TensorRT-LLM's C++ backend as it came also needs an engine, or parameters of it, for the feature: see
`TRTLLM_PARAMETERS` in `make help`. In backend trtllm-pytorch KV cache retention needs TensorRT-LLM 1.2 or later, and
top-p decay 1.3.0rc26 or later: the PyTorch flow of earlier ones drops them without a word, so the backend refuses them.
Logits need 1.2 or later there, come with whole answers only (no `stream`), and are 128 MiB at most; the prompt is then
computed anew, as of tokens in reused KV blocks there are none.

Why this backend refuses what the LLM API has by other means: it loads LoRA adapters from folders, and not the weights
that these tensors carry (with `MODEL_CONTRACT=llmapi` and `TRTLLM_PARAMETERS=lora_dir=FOLDER` a request names one by
`lora_id`, `lora_name` and `lora_path`, a folder in that one); draft tokens and lookahead belong to the compiled
engines' decoder. Beam search is a setting of its whole engine there: with `max_beam_width` 4 it takes requests of
exactly 4 beams and refuses all others, so that an engine which serves beams serves nothing else.

What `num_output_tokens` counts differs by model: at `ensemble`, `tensorrt_llm` and `tensorrt_llm_bls`, as at NVIDIA's,
the tokens that the response holds, those of a prompt that is not excluded too; at `text_generation` and `hf_baseline`
all that have been generated up to the response. The times of `return_perf_metrics` are of a steady clock everywhere.

| input | also called | what for | {lanes} |
|---|---|---|{rules}|
"""


def _added(name: str, parameter: Declaration) -> str:
    kind = f"{parameter.wire_type} [{'n' if parameter.many else 1}]"
    if parameter.limits:
        kind += f", {parameter.limits[0]} to {parameter.limits[1]}"
    if parameter.default is True:
        kind += ", true"
    return f"| `{name}` | {kind} | {parameter.what} |"


ADDED = "\n".join(_added(name, parameter) for name, parameter in DECLARED.items() if parameter.ours)
TAIL = f"""
## What `text_generation` adds

[n] stands for any number of values, {words.MOST_WORDS} at most but for a prompt. Wrong values are refused with the
tensor, the value and the range.

| input | type | |
|---|---|---|
| `input_ids` | INT32 [n] | the prompt as token ids, in place of `text_input` and as it is: no BOS is added |
{ADDED}

| output | type | |
|---|---|---|
| `token_ids` | INT32 [n] | this response's tokens |
| `top_token_ids` | INT32 [n, `top_logprobs`] | in each one's place, the likeliest first; {NO_TOKEN} if fewer |
| `top_log_probs` | FP32 [n, `top_logprobs`] | theirs |
| `finish_reason` | STRING [1] | of the last response: `length`, `end_id`, `stop_words`, `cancelled` |

`end_id` is the reason where an end token or a stop token came; `cancelled` where nobody took the answer
for half a minute.

## Answers that keep to a guide

`guided_decoding_guide_type` says what `guided_decoding_guide` is:

| type | guide | backends |
|---|---|---|
| `json` | none: an object or an array | all |
| `json_schema` | a JSON schema, and not OpenAI's wrapper of one | all |
| `regex` | what the whole answer matches | all |
| `ebnf_grammar` | `root ::= ...` | all |
| `structural_tag` | free text in which certain words begin something that keeps to a schema | torch, trtllm-pytorch |
| `lark` | a Lark grammar, as llguidance has it | torch |

Our models compile a guide before anything runs (llguidance), and refuse what cannot be enforced by name: `uniqueItems`,
`not`, `if`, `contains`, unknown keywords and formats, look-arounds; also an unknown type. In backend trtllm-engine
`ensemble` hands both tensors to NVIDIA's backend as they came, and a type that this does not know is not enforced:
ask `text_generation` or `tensorrt_llm_bls` there. TensorRT-LLM needs
`TRTLLM_PARAMETERS=guided_decoding_backend=xgrammar` for it (trtllm-engine also `xgrammar_tokenizer_info_path`), and
xgrammar does not enforce all that llguidance does.

In backend torch white space between JSON's tokens is bounded. An answer ends where its grammar does, with
`finish_reason` `end_id`: before `min_tokens`, and with `ignore_eos` too. As long as the grammar goes on, both hold.
Stop words and `max_tokens` may cut it. Where bans leave nothing of what the grammar allows, the request ends with an
error. Log-probabilities are the model's own, as without a guide.

## Several answers to one prompt

`num_return_sequences` (1 to {MOST_SEQUENCES}) is served by every model that is decoupled. In backend torch the prompt
is computed once, and the answers share its KV blocks. Each response says in `sequence_index`, from 0, which answer it
belongs to; without `stream` each answer is one response. They come in any order, and the last response of all has the
final flag. Over HTTP that takes `generate_stream`: `generate` is for one response.

With a `seed`, answer i is the one that a request with the seed (`seed` + i) mod 2^64 gets; without one each has its
own. Cancelling or stopping the request ends them all. Where one fails, its error begins with `sequence_index`, and the
others go on; Triton however ends an ensemble's request at its first error.
"""


def page() -> str:
    """The whole page as Markdown."""
    head = HEAD.format(
        lanes=" | ".join(f"`{lane}`" for lane in LANES), rules="---|" * (len(LANES) - 1) + "---"
    )
    return head + "".join(_row(tensor) for tensor in TABLE) + TAIL


def _row(tensor: Tensor) -> str:
    also = ", ".join(f"`{name}`" for name in tensor.aliases)
    cells = [f"`{tensor.name}`", also, tensor.feature, *(_cell(tensor, lane) for lane in LANES)]
    return "| " + " | ".join(cells) + " |\n"


def _cell(tensor: Tensor, lane: str) -> str:
    if tensor.ignored:
        return "ignored"
    if lane not in tensor.lanes:
        return "no"
    if tensor.ours:
        return "text_generation"
    return "ensemble" if tensor.ensemble_only else "yes"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
