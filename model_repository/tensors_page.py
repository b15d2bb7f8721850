"""``docs/TENSORS.md``, made from the table that the models read: ``python -m model_repository.tensors_page``."""

from __future__ import annotations

from pathlib import Path

from model_repository.shared.tensors import LANES, TABLE, Tensor

PAGE = Path(__file__).parents[1] / "docs/TENSORS.md"
HEAD = """# Which input works in which lane

Made from `TABLE` in `model_repository/shared/tensors.py` by `python -m model_repository.tensors_page`; a test holds the
two together. Names are those of NVIDIA's `ensemble`, with the other names of `preprocessing` and `tensorrt_llm`.

* **yes**: served.
* **ensemble**: by `ensemble` and `tensorrt_llm`, NVIDIA's own there; `text_generation` and `tensorrt_llm_bls`, whose
  answer is one text, refuse it by name.
* **no**: refused with the name of the tensor and of the lane, unless its value asks for nothing (`beam_width` 1).
* **ignored**: NVIDIA's preprocessing sends it to every model, and one without a decoder apart does not look at it.

What goes to TensorRT-LLM's C++ backend as it came also needs an engine, or parameters of it, for the feature: see
`TRTLLM_PARAMETERS` in `make help`. In lane trtllm-pytorch guided decoding needs
`TRTLLM_PARAMETERS=guided_decoding_backend=xgrammar`.

| input | also called | what for | {lanes} |
|---|---|---|{rules}|
"""


def page() -> str:
    """The whole page as Markdown."""
    head = HEAD.format(
        lanes=" | ".join(f"`{lane}`" for lane in LANES), rules="---|" * (len(LANES) - 1) + "---"
    )
    return head + "".join(_row(tensor) for tensor in TABLE)


def _row(tensor: Tensor) -> str:
    also = ", ".join(f"`{name}`" for name in tensor.aliases)
    cells = [f"`{tensor.name}`", also, tensor.feature, *(_cell(tensor, lane) for lane in LANES)]
    return "| " + " | ".join(cells) + " |\n"


def _cell(tensor: Tensor, lane: str) -> str:
    if tensor.ignored:
        return "ignored"
    if lane not in tensor.lanes:
        return "no"
    return "ensemble" if tensor.ensemble_only else "yes"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
