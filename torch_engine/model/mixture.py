"""A mixture of experts as data: how a family's routers choose, and what its tensors are called. No torch.

The families differ in few ways (score, what corrects the choice, groups, normalisation, shared experts), so that one
routed MLP runs all of them; a layer without a :class:`MixtureSpec` has a dense MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flightline.torch_engine.model.fields import Fields

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM")
MOST_EXPERTS = 512


@dataclass(frozen=True)
class MixtureNames:
    """Modules of a routed MLP, below ``model.layers.N``."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"

    @property
    def router(self) -> str:
        return f"{self.block}.gate"

    @property
    def correction(self) -> str:
        return f"{self.router}.e_score_correction_bias"

    @property
    def shared_gate(self) -> str:
        return f"{self.block}.shared_expert_gate"

    def expert(self, number: int) -> tuple[str, str, str]:
        """Gate, up and down of an expert."""
        each = f"{self.block}.experts.{number}"
        return f"{each}.{self.gate}", f"{each}.{self.up}", f"{each}.{self.down}"

    def shared_expert(self) -> tuple[str, str, str]:
        each = f"{self.block}.{self.shared}"
        return f"{each}.gate_proj", f"{each}.up_proj", f"{each}.down_proj"


@dataclass(frozen=True)
class MixtureSpec:
    """The routed MLP of a layer.

    The router scores all experts in float32; the ``chosen`` best of each token work for it, and their results are
    added, each times its weight, which is its score. Equal scores: the lower number is taken.
    """

    experts: int
    chosen: int
    inner: int
    """Inner size of each expert."""
    score: str = "softmax"
    """``softmax`` over all experts, or ``sigmoid``."""
    correction: bool = False
    """A learned number for each expert is added to its score for the choice alone."""
    groups: int = 1
    kept_groups: int = 1
    """Only experts of the so many best groups are chosen; a group is as good as the sum of its two best."""
    normalise: bool = False
    """Whether the weights are divided by their sum."""
    scale: float = 1.0
    """Times each weight, after that."""
    shared_inner: int = 0
    """Inner size of an expert that works for every token; 0: there is none."""
    shared_gate: bool = False
    """Whether the shared expert's result is multiplied by a learned sigmoid of the token."""
    names: MixtureNames = MixtureNames()


def load_mixtures(fields: Fields, architecture: str, layers: int) -> tuple[MixtureSpec | None, ...]:
    """For each layer its routed MLP; None: a dense one.

    Raises:
        UnsupportedModel: a field is not valid.
    """
    if architecture not in ARCHITECTURES:
        return (None,) * layers
    if architecture == "MixtralForCausalLM":
        mixture = MixtureSpec(
            *_counts(fields, "num_local_experts", 8, 2),
            fields.whole("intermediate_size"),
            normalise=True,
            names=MixtureNames("block_sparse_moe", "w1", "w3", "w2"),
        )
        return (mixture,) * layers
    return _qwen(fields, architecture, layers)


def _qwen(fields: Fields, architecture: str, layers: int) -> tuple[MixtureSpec | None, ...]:
    older = architecture == "Qwen2MoeForCausalLM"
    mixture = MixtureSpec(
        *_counts(fields, "num_experts", *((60, 4) if older else (128, 8))),
        fields.whole("moe_intermediate_size", 1408 if older else 768),
        normalise=fields.flag("norm_topk_prob", False),
    )
    if older:
        shared = fields.whole("shared_expert_intermediate_size", 5632)
        mixture = replace(mixture, shared_inner=shared, shared_gate=True)
    step = fields.whole("decoder_sparse_step", 1)
    dense = fields.ids("mlp_only_layers") or ()
    return tuple(
        mixture if index not in dense and (index + 1) % step == 0 else None for index in range(layers)
    )


OTHER_NAME = "num_local_experts"
"""What Transformers 5 calls every family's number of experts in the files that it writes."""


def _counts(fields: Fields, name: str, default: int, default_chosen: int) -> tuple[int, int]:
    """Experts, and how many of them are chosen for a token."""
    if name not in fields.config and OTHER_NAME in fields.config:
        name = OTHER_NAME
    experts = fields.whole(name, default)
    if fields.whole(OTHER_NAME, experts) != experts:
        raise fields.refuse(OTHER_NAME, f"{name} is {experts}: fetch the checkpoint again")
    if experts > MOST_EXPERTS:
        raise fields.refuse(name, f"at most {MOST_EXPERTS} experts are supported: use another checkpoint")
    chosen = fields.whole("num_experts_per_tok", default_chosen)
    if chosen > experts:
        raise fields.refuse("num_experts_per_tok", f"it must be at most {name}={experts}")
    return experts, chosen


Shape = tuple[str, ...]
"""What a tensor's extents are, by name."""


def mixture_sizes(mixture: MixtureSpec) -> dict[str, int]:
    """Extents that only mixtures have."""
    return {
        "experts": mixture.experts,
        "expert inner size": mixture.inner,
        "shared expert inner size": mixture.shared_inner,
        "1": 1,
    }


def mixture_linears(mixture: MixtureSpec) -> dict[str, tuple[str, str]]:
    """Modules of a routed MLP to their outputs and inputs."""
    names, hidden, inner = mixture.names, "hidden_size", "expert inner size"
    linears = {names.router: ("experts", hidden)}
    for number in range(mixture.experts):
        gate, up, down = names.expert(number)
        linears |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    if mixture.shared_inner:
        gate, up, down = names.shared_expert()
        inner = "shared expert inner size"
        linears |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    if mixture.shared_gate:
        linears[names.shared_gate] = ("1", hidden)
    return linears
