"""Stage 4: is what we serve still the same model? Perplexity and teacher-forced agreement with its source.

What serves is judged: backend torch's engine itself (engine_model.py), with its weights, kernels and KV cache. The FP8
checkpoint, which other engines load too, is first run as a W8A8 engine runs it: dequantised weights, activations
rounded to e4m3 with the static input scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flightline.engine_build import source_model
from flightline.engine_build.errors import BuildError, GateRefused
from flightline.engine_build.hf_format import read_tensors
from flightline.engine_build.prompts import Sample
from flightline.engine_build.quantize import E4M3_MAX
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.weights import Checkpoint

MAX_PERPLEXITY_RISE = 0.04
MIN_AGREEMENT = 0.85
WINDOW = 512
MAX_TOKENS = 2048
"""More than any gate prompt has together with its continuation, and than a window."""
MAX_WINDOWS = 6
ABSURD_PERPLEXITY = 1000.0
"""Of a source on plain English text, where trained models have 5 to 60 a token."""
CONTINUATION_TOKENS = 32
DECODED_TOKENS = 48
"""Of the first window's end; computed one at a time, too."""
Become = Callable[[Any], Any]
"""From the source model to what is compared with it: called like a Transformers model, and gives ``logits``."""


@dataclass(frozen=True)
class Reference:
    """What the source says: all that a candidate is compared with."""

    windows: list[list[int]]
    rows: list[list[int]]
    """Prompts, as ids."""
    answers: list[list[int]]
    """The source's greedy tokens after each."""
    surprisals: torch.Tensor
    """[scored tokens] float64, of the windows."""


@dataclass(frozen=True)
class Decoded:
    """Tokens in a step of their own, as generated ones are, against the same tokens within a prompt.

    Other kernels compute them, and they read from the KV cache what other steps have written.
    """

    tokens: int
    perplexity_rise: float
    agreement: float
    """Share of the tokens after which both find the same one likeliest."""

    @property
    def right(self) -> bool:
        # Written so that a NaN fails. Lower than within a prompt is as wrong as higher.
        return abs(self.perplexity_rise) <= MAX_PERPLEXITY_RISE and self.agreement >= MIN_AGREEMENT

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens one at a time: {self.perplexity_rise:+.1%}, agreement {self.agreement:.3f}"
        )


@dataclass(frozen=True)
class GateResult:
    """Measured on the gate text and prompts."""

    source_perplexity: float
    perplexity: float
    agreement: float
    """Share of the source's greedy tokens that the candidate also chooses, given the source's history."""
    scored_tokens: int
    compared_tokens: int
    rise_error: float
    """Standard error of the perplexity's rise, from the paired differences of the scored tokens."""
    decoded: Decoded | None = None
    """None where nothing that serves is judged."""

    @property
    def agreement_error(self) -> float:
        """Standard error of a share of so many tokens."""
        return math.sqrt(self.agreement * (1 - self.agreement) / self.compared_tokens)

    @property
    def perplexity_rise(self) -> float:
        return self.perplexity / self.source_perplexity - 1

    @property
    def remark(self) -> str | None:
        """What is odd about the source itself."""
        if self.source_perplexity <= ABSURD_PERPLEXITY:
            return None
        return (
            f"the source model's own perplexity is {self.source_perplexity:,.0f} on plain English text, where trained "
            "models have 5 to 60: see whether it is trained, whole, and has the right tokenizer"
        )

    def record(self) -> dict[str, Any]:
        """For the manifest, with the limits."""
        limits = {"max_perplexity_rise": MAX_PERPLEXITY_RISE, "min_agreement": MIN_AGREEMENT}
        derived = {"perplexity_rise": self.perplexity_rise, "agreement_error": self.agreement_error}
        return asdict(self) | derived | limits

    def __str__(self) -> str:
        return (
            f"perplexity {self.source_perplexity:.2f} -> {self.perplexity:.2f} "
            f"({self.perplexity_rise:+.1%} ± {self.rise_error:.1%}, limit {MAX_PERPLEXITY_RISE:+.0%}), "
            f"top-1 agreement {self.agreement:.3f} ± {self.agreement_error:.3f} (limit {MIN_AGREEMENT})"
            + (f"; {self.decoded}" if self.decoded else "")
        )

    def require(self, what: str, remedy: str) -> None:
        """Raises:
        GateRefused: a limit is passed; the message names ``what`` failed.
        """
        # Written so that a NaN fails.
        same = self.perplexity_rise <= MAX_PERPLEXITY_RISE and self.agreement >= MIN_AGREEMENT
        if same and (self.decoded is None or self.decoded.right):
            return
        raise GateRefused(f"{what} failed the accuracy gate: {self}: {remedy}", str(self))


def measure(
    source: Path, become: Become, text: str, prompts: list[Sample], device: str, dtype: str
) -> GateResult:
    """Runs the source and then what ``become`` makes of it, in the same memory.

    Raises:
        BuildError: the source itself gives no finite logits.
    """
    model, tokenizer = source_model.load(source, device, dtype)
    reference = refer(source, model, tokenizer, text, prompts)
    return judge(reference, become(model))


def refer(source: Path, model: Any, tokenizer: Any, text: str, prompts: list[Sample]) -> Reference:
    """Runs the source; raises as :func:`measure`."""
    window = min(WINDOW, model.config.get_text_config().max_position_embeddings)
    windows = _windows(source_model.encode(tokenizer, text), window)
    rows = [source_model.encode(tokenizer, sample.render(tokenizer)) for sample in prompts]
    surprisals = _surprisals(model, windows)
    if not surprisals.isfinite().all():
        raise BuildError(_not_finite(source))
    answers = source_model.greedy(model, rows, CONTINUATION_TOKENS)
    return Reference(windows, rows, answers, surprisals)


def _not_finite(source: Path) -> str:
    broken = [name for name, tensor in read_tensors(source) if not tensor.float().isfinite().all()]
    why = (
        f"{len(broken)} of its tensors hold NaN or infinity, the first is {broken[0]}"
        if broken
        else "it overflows"
    )
    return f"{source}: the source model's logits are not finite ({why}): fetch the checkpoint again"


def judge(reference: Reference, model: Any) -> GateResult:
    """Runs ``model``, called like a Transformers model, on what the source was run on.

    One that has ``decode`` (engine_model.py) is also held against itself, one token at a time.
    """
    before, after = reference.surprisals, _surprisals(model, reference.windows)
    pairs = zip(reference.rows, reference.answers, strict=True)
    agreed = sum(_agreements(model, row, answer) for row, answer in pairs)
    compared = sum(map(len, reference.answers))
    return GateResult(
        source_perplexity=_perplexity(before),
        perplexity=_perplexity(after),
        agreement=agreed / compared,
        scored_tokens=len(before),
        compared_tokens=compared,
        rise_error=_rise_error(before, after),
        decoded=_decoded(model, reference.windows[0]) if hasattr(model, "decode") else None,
    )


@torch.inference_mode()
def _decoded(model: Any, window: list[int]) -> Decoded:
    """The last tokens of ``window`` within it, and one at a time after the others."""
    count = min(DECODED_TOKENS, len(window) // 2)
    ids = torch.tensor(window, device=model.device)
    inputs, targets = ids[:-1], ids[-count:]
    whole = model(inputs[None], logits_to_keep=count).logits[0].float()
    alone = model.decode(inputs, len(inputs) - count).float()
    whole_loss, alone_loss = (
        torch.nn.functional.cross_entropy(logits, targets).double() for logits in (whole, alone)
    )
    return Decoded(
        tokens=count,
        perplexity_rise=(alone_loss - whole_loss).exp().item() - 1,
        agreement=(whole.argmax(-1) == alone.argmax(-1)).double().mean().item(),
    )


def become_w8a8(model: Any, quantized: Path) -> Any:
    """Turns a loaded source model into the FP8 checkpoint's arithmetic, in place; returns it.

    Raises BuildError for a mixture of experts, whose linears are no modules of the source model.
    """
    modules = {
        name.replace("model.language_model.", "model.", 1): each for name, each in model.named_modules()
    }
    for name, coded in Checkpoint(quantized, load_spec(quantized)).codes():
        if name not in modules:
            raise BuildError(
                f"the gate of this backend cannot run FP8 mixtures of experts ({name}): "
                "use ENGINE=torch or PRECISION=bf16"
            )
        with torch.no_grad():
            modules[name].weight.copy_(coded.values(torch.float32))
        if coded.scales.shape[1] == 1:  # in groups and blocks the activations stay as they are
            modules[name].register_forward_pre_hook(_rounding(coded.input_scale))
    return model


def _rounding(known: torch.Tensor | None) -> Any:
    """To e4m3 with the scale that is known, else with one for each row."""

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = args[0]
        if known is None:
            scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
        else:
            scale = known.to(x.device)
        codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (codes.float() * scale).to(x.dtype)

    return hook


def _windows(ids: list[int], size: int) -> list[list[int]]:
    count = min(MAX_WINDOWS, max(1, len(ids) // size))
    return [ids[start : start + size] for start in range(0, count * size, size)]


@torch.inference_mode()
def _surprisals(model: Any, windows: list[list[int]]) -> torch.Tensor:
    """-log p of each token given its window's tokens before it, in float64: ``[scored tokens]``."""
    rows = []
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        rows.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().double())
    return torch.cat(rows)


def _perplexity(surprisals: torch.Tensor) -> float:
    mean = surprisals.mean().item()
    return math.exp(mean) if math.isfinite(mean) else math.inf


def _rise_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Both models score the same tokens, so the mean of their differences is what is uncertain."""
    differences = after - before
    return float(differences.mean().exp() * differences.std()) / math.sqrt(len(differences))


@torch.inference_mode()
def _agreements(model: Any, prompt: list[int], answer: list[int]) -> int:
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return int((logits.argmax(-1) == ids[0, len(prompt) :]).sum())
