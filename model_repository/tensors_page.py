"""The tables of inputs in ``docs/TENSORS.md``, made from those that the models read."""

from __future__ import annotations

from flightline.client.params import DECLARED, Declaration
from flightline.model_repository.shared.tensors import LANES, TABLE, Tensor


def parts() -> dict[str, str]:
    """For ``flightline/pages.py``."""
    backends = " | ".join(f"`{lane}`" for lane in LANES)
    head = f"| input | also called | what for | {backends} |\n|---|---|---|{'---|' * len(LANES)}\n"
    added = (_added(name, parameter) for name, parameter in DECLARED.items() if parameter.ours)
    return {
        "inputs": head + "".join(_row(tensor) for tensor in TABLE),
        "added inputs": "| input | type | |\n|---|---|---|\n" + "\n".join([INPUT_IDS, *added]),
    }


INPUT_IDS = "| `input_ids` | INT32 [n] | the prompt as token ids, as it is, in place of `text_input`: no BOS is added |"


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


def _added(name: str, parameter: Declaration) -> str:
    kind = f"{parameter.wire_type} [{'n' if parameter.many else 1}]"
    if parameter.limits:
        kind += f", {parameter.limits[0]} to {parameter.limits[1]}"
    if parameter.default is True:
        kind += ", true"
    return f"| `{name}` | {kind} | {parameter.what} |"
