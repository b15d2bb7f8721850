"""How a model is cut up between ranks (tensor parallelism, as Shoeybi et al. 2019 cut it). No torch.

A rank has some of the heads and some of the MLP's inner columns, from the projections into them to the one out of
them; what comes out are partial sums, which the ranks add up. Norms and embeddings are whole on each rank, the output
head is cut along the vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.layout import HIDDEN, INNER, KEYS, LAYER, LINEARS, QUERIES, SINKS
from flightline.torch_engine.model.mixture import EXPERT_INNER, SHARED_INNER, MixtureSpec, mixture_linears
from flightline.torch_engine.model.spec import LayerSpec, ModelSpec

HEAD_MULTIPLE = 16
"""Tokens of the vocabulary of which a rank has a multiple: FP8 products want that."""
VOCABULARY = "vocab_size"
SCALARS = ("weight_scale", "input_scale", "k_scale", "v_scale")
"""One for the whole tensor: the codes of all ranks are those of the whole."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Of a tensor. ``None`` = all."""

    rows: Range | None = None
    columns: Range | None = None
    absent: bool = False
    """The rank has none of it: another one adds it."""


WHOLE = Part()


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The decoder of this rank alone; ``vocab_size`` and ``hidden_size`` stay those of the whole.

        Raises:
            UnsupportedModel: it cannot be cut into so many pieces; the message names the number.
        """
        if self.size == 1:
            return spec
        if reason := refusal(spec, self.size):
            raise UnsupportedModel(reason)
        return dataclasses.replace(
            spec,
            num_heads=spec.num_heads // self.size,
            num_kv_heads=max(1, spec.num_kv_heads // self.size),
            intermediate_size=spec.intermediate_size // self.size,
            layers=tuple(self._layer(layer) for layer in spec.layers),
        )

    def _layer(self, layer: LayerSpec) -> LayerSpec:
        """Each rank has a part of every expert: all of them work, whichever are chosen."""
        if layer.mixture is None:
            return layer
        inner, shared = layer.mixture.inner // self.size, layer.mixture.shared_inner // self.size
        return dataclasses.replace(
            layer, mixture=dataclasses.replace(layer.mixture, inner=inner, shared_inner=shared)
        )

    def part(self, name: str, shape: tuple[int, ...], spec: ModelSpec) -> Part:
        """What this rank has of the checkpoint's tensor ``name``; ``spec`` is the whole model's.

        Raises:
            UnsupportedModel: nobody has said how such a tensor is cut.
        """
        if self.size == 1:
            return WHOLE
        module, _, leaf = name.rpartition(".")
        if leaf in SCALARS:
            return WHOLE
        if name.endswith(f".{SINKS}"):
            return Part(self._even(spec.num_heads))
        mixture = _mixture(name, spec)
        if mixture is not None and name.endswith(f".{mixture.names.correction}"):
            return WHOLE
        extents = _extents(module, mixture)
        if extents is not None and leaf in ("weight", "bias"):
            outputs, inputs = (self._range(extent, spec, mixture) for extent in extents)
            if leaf == "weight":
                return Part(outputs, inputs)
            return Part(outputs, absent=inputs is not None and self.rank > 0)  # what is added up has one bias
        if leaf == "weight" and module.endswith("embed_tokens"):
            return WHOLE
        of_heads = module.endswith(("q_norm", "k_norm"))
        if leaf == "weight" and of_heads and spec.qk_norm == "row":
            # One for each output of its projection.
            return Part(self._range(QUERIES if module.endswith("q_norm") else KEYS, spec, mixture))
        if module.endswith("norm") and shape == ((spec.head_dim,) if of_heads else (spec.hidden_size,)):
            return WHOLE
        raise UnsupportedModel(
            f"{spec.architecture} cannot be shared by {self.size} GPUs: it is not known how its tensor {name} is cut "
            "up; use TP=1"
        )

    def _range(self, extent: str, spec: ModelSpec, mixture: MixtureSpec | None) -> Range | None:
        """What a rank has of an extent, by its name in ``layout.py``; None = all."""
        if extent == VOCABULARY:
            return self.vocabulary(spec.vocab_size)[:2]
        if extent == KEYS:
            return self._keys(spec)
        if extent == QUERIES:
            return self._even(spec.num_heads * spec.head_dim)
        if mixture is not None and extent in (EXPERT_INNER, SHARED_INNER):
            return self._even(mixture.inner if extent == EXPERT_INNER else mixture.shared_inner)
        return self._even(spec.intermediate_size) if extent == INNER else None

    def vocabulary(self, size: int) -> tuple[int, int, int]:
        """The first token of this rank's part, the one after its last, and how many it has fewer than rank 0."""
        if self.size == 1:
            return 0, size, 0
        each = -(-size // self.size)
        each = -(-each // HEAD_MULTIPLE) * HEAD_MULTIPLE
        begin = min(self.rank * each, size)
        end = min(begin + each, size)
        return begin, end, each - (end - begin)

    def _even(self, size: int) -> Range:
        each = size // self.size
        return self.rank * each, (self.rank + 1) * each

    def _keys(self, spec: ModelSpec) -> Range:
        """Key and value heads; fewer heads than ranks are held by several."""
        each = max(1, spec.num_kv_heads // self.size)
        first = self.rank * spec.num_kv_heads // self.size
        return first * spec.head_dim, (first + each) * spec.head_dim


def _mixture(name: str, spec: ModelSpec) -> MixtureSpec | None:
    """Of the layer that a tensor belongs to."""
    layer = LAYER.match(name)
    return None if layer is None else spec.layers[int(layer.group(1))].mixture


def _extents(module: str, mixture: MixtureSpec | None) -> tuple[str, str] | None:
    """The names of a linear's outputs and inputs; None if it is none."""
    if module == "lm_head":
        return VOCABULARY, HIDDEN
    layer = LAYER.match(module)
    if layer is None:
        return None
    routed = {} if mixture is None else mixture_linears(mixture)
    return routed.get(module[layer.end() :]) or LINEARS.get(module[layer.end() :])


def refusal(spec: ModelSpec, size: int) -> str:
    """Why ``size`` ranks cannot share the model; empty if they can."""
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    fitting = ", ".join(str(n) for n in range(2, 17) if not _misfit(spec, n))
    remedy = f"use TP={fitting.replace(', ', ' or ')}" if fitting else "use TP=1"
    if misfit := _misfit(spec, size):
        return (
            f"TP={size} does not fit {spec.architecture} with {heads} heads, {kv_heads} key/value heads and an MLP of "
            f"{spec.intermediate_size}: {misfit}; {remedy}"
        )
    return ""


def _misfit(spec: ModelSpec, size: int) -> str:
    if spec.num_heads % size:
        return f"{size} does not divide the heads"
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        return f"neither of {size} and the number of key/value heads divides the other"
    if spec.intermediate_size % size:
        return f"{size} does not divide the MLP"
    mixtures = [layer.mixture for layer in spec.layers if layer.mixture]
    experts = {inner for mixture in mixtures for inner in (mixture.inner, mixture.shared_inner)}
    if any(inner % size for inner in experts):
        return f"{size} does not divide the inner size of its experts"
    group = 0 if spec.quantization is None else spec.quantization.inputs_of_a_scale
    cut = experts | ({spec.intermediate_size} if len(mixtures) < spec.num_layers else set())
    if spec.quantization is not None and not spec.quantization.experts_alone:
        cut |= {spec.num_heads * spec.head_dim}
    if group and any(inputs // size % group for inputs in cut):
        return f"inputs of one scale ({group} of {spec.stored}) would lie on two GPUs"
    begin, end, _ = Shard(size - 1, size).vocabulary(spec.vocab_size)
    if begin == end:
        return f"{spec.vocab_size} tokens are too few for {size}"
    return ""
