"""A mixture of experts as data: how a family's routers choose, and what its tensors are called. No torch.

The families differ in few ways (score, what corrects the choice, groups, normalisation, shared experts), so that one
routed MLP runs all of them; a layer without a :class:`MixtureSpec` has a dense MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from flightline.torch_engine.model.fields import Fields

MOST_EXPERTS = 512
CLAMPED_SLOPE = 1.702
"""Of the sigmoid in the clamped activation."""


@dataclass(frozen=True)
class MixtureNames:
    """Modules of a routed MLP, below ``model.layers.N``."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"
    choice: str = "gate"
    """The router."""

    @property
    def router(self) -> str:
        return f"{self.block}.{self.choice}"

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
    router_bias: bool = False
    expert_bias: bool = False
    """Whether all linears of the experts have one."""
    clamp: float | None = None
    """Instead of the model's activation of gate and up: both are clamped (the gate from above alone), and
    gate * sigmoid(:data:`CLAMPED_SLOPE` * gate) is taken times up + 1."""
    stacked: bool = False
    """The checkpoint has one tensor of all experts, with gate and up in turns (``stacked.py``)."""
    names: MixtureNames = MixtureNames()


Mixtures = Callable[[Fields, int], tuple[MixtureSpec | None, ...]]
"""From a configuration and the number of its layers to the routed MLP of each; None: a dense one."""


def mixtral_mixtures(fields: Fields, layers: int) -> tuple[MixtureSpec | None, ...]:
    mixture = MixtureSpec(
        *_counts(fields, "num_local_experts", 8, 2),
        fields.whole("intermediate_size"),
        normalise=True,
        names=MixtureNames("block_sparse_moe", "w1", "w3", "w2"),
    )
    return (mixture,) * layers


def qwen_mixtures(fields: Fields, layers: int) -> tuple[MixtureSpec | None, ...]:
    """Of Qwen 2 and 3; OLMoE, whose layers are all alike, names its experts' size as a dense model does."""
    shared = fields.whole("shared_expert_intermediate_size", 0, least=0)
    olmoe = "OlmoeForCausalLM" in fields.words("architectures")
    mixture = MixtureSpec(
        *_counts(fields, "num_experts", 60 if shared else 128, 8),
        fields.whole("intermediate_size") if olmoe else fields.whole("moe_intermediate_size", 768),
        normalise=fields.flag("norm_topk_prob", False),
        shared_inner=shared,
        shared_gate=shared > 0,
    )
    step = fields.whole("decoder_sparse_step", 1)
    dense = fields.ids("mlp_only_layers") or ()
    return tuple(
        mixture if index not in dense and (index + 1) % step == 0 else None for index in range(layers)
    )


def glm_mixtures(fields: Fields, layers: int) -> tuple[MixtureSpec | None, ...]:
    """Routing of DeepSeek-V3."""
    experts, chosen = _counts(fields, "n_routed_experts", 128, 8)
    groups, kept = fields.whole("n_group", 1), fields.whole("topk_group", 1)
    if experts % groups:
        raise fields.refuse("n_group", f"it must divide the number of experts, {experts}")
    if kept > groups or kept * (experts // groups) < chosen:
        raise fields.refuse("topk_group", f"of {groups} groups it must leave {chosen} experts to choose")
    inner = fields.whole("moe_intermediate_size", 1408)
    mixture = MixtureSpec(
        experts,
        chosen,
        inner,
        score="sigmoid",
        correction=True,
        groups=groups,
        kept_groups=kept,
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.positive("routed_scaling_factor", 1.0),
        shared_inner=inner * fields.whole("n_shared_experts", 1, least=0),
        names=MixtureNames(shared="shared_experts"),
    )
    dense = fields.whole("first_k_dense_replace", 1, least=0)
    return (None,) * min(dense, layers) + (mixture,) * max(0, layers - dense)


def gpt_oss_mixtures(fields: Fields, layers: int) -> tuple[MixtureSpec | None, ...]:
    experts, chosen = _counts(fields, OTHER_NAME, 128, 4)
    if fields.whole("experts_per_token", chosen) != chosen:
        raise fields.refuse(
            "experts_per_token", f"num_experts_per_tok is {chosen}: fetch the checkpoint again"
        )
    mixture = MixtureSpec(
        experts,
        chosen,
        fields.whole("intermediate_size"),
        normalise=True,  # a softmax over the chosen alone is the same
        router_bias=True,
        expert_bias=True,
        clamp=fields.positive("swiglu_limit", 7.0),
        stacked=True,
        names=MixtureNames(choice="router"),
    )
    return (mixture,) * layers


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


EXPERT_INNER, SHARED_INNER = "expert inner size", "shared expert inner size"


def mixture_sizes(mixture: MixtureSpec) -> dict[str, int]:
    """Extents that only mixtures have."""
    return {
        "experts": mixture.experts,
        EXPERT_INNER: mixture.inner,
        SHARED_INNER: mixture.shared_inner,
        "1": 1,
    }


@functools.lru_cache(maxsize=8)
def mixture_linears(mixture: MixtureSpec) -> dict[str, tuple[str, str]]:
    """Modules of a routed MLP to their outputs and inputs."""
    names, hidden, inner = mixture.names, "hidden_size", EXPERT_INNER
    linears = {names.router: ("experts", hidden)}
    for number in range(mixture.experts):
        gate, up, down = names.expert(number)
        linears |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    if mixture.shared_inner:
        gate, up, down = names.shared_expert()
        inner = SHARED_INNER
        linears |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    if mixture.shared_gate:
        linears[names.shared_gate] = ("1", hidden)
    return linears
