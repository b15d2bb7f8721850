"""Mixtures of experts on CPUs: routing against Transformers' routers, the compiled kernels against their parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.kernels.cpu.toolchain import compiler
from flightline.torch_engine.kernels.reference.mixture import route
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.coded import Coded, stack
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.mixture import MixtureSpec, mixture_linears, mixture_sizes
from flightline.torch_engine.model.shard import refusal
from tests.tiny import tiny_checkpoint

needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler: the build takes the PyTorch kernels"
)
CPU = torch.device("cpu")
HIDDEN = 72
PLAIN = MixtureSpec(experts=9, chosen=3, inner=40)
GROUPED = MixtureSpec(
    experts=12, chosen=4, inner=40, score="sigmoid", correction=True, groups=4, kept_groups=2, normalise=True,
    scale=2.5,
)  # fmt: skip
BIASED = replace(PLAIN, normalise=True, router_bias=True, expert_bias=True, clamp=0.5)
"""As gpt-oss has them; half of all values are clamped."""
SHARED = replace(PLAIN, shared_inner=56, shared_gate=True)
MIXTURES = {"plain": PLAIN, "grouped": GROUPED, "shared": SHARED, "all experts": replace(PLAIN, chosen=9)}


class Drawn:
    """A checkpoint of one routed MLP in memory: random weights, in bfloat16's precision."""

    spec = SimpleNamespace(quantization=None)

    def __init__(self, mixture: MixtureSpec, hidden: int = HIDDEN) -> None:
        sizes = mixture_sizes(mixture) | {"hidden_size": hidden}
        generator = torch.Generator().manual_seed(3)
        self.tensors = {}
        for name, shape in mixture_linears(mixture).items():
            drawn = torch.randn(*(sizes[extent] for extent in shape), generator=generator)
            self.tensors[f"layer.{name}.weight"] = (drawn / drawn.shape[1] ** 0.5).bfloat16().float()
        for name in list(self.tensors):
            if (mixture.expert_bias and ".experts." in name) or (mixture.router_bias and ".gate." in name):
                size = len(self.tensors[name])
                self.tensors[name.replace("weight", "bias")] = torch.randn(size, generator=generator) / 2
        if mixture.correction:
            self.tensors[f"layer.{mixture.names.correction}"] = (
                torch.randn(mixture.experts, generator=generator) / 3
            )

    def raw(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        return self.raw(f"{module}.weight").to(dtype)

    def fused(self, modules: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.cat([self.weight(module, dtype) for module in modules]), self.biases(modules)

    def biases(self, modules: list[str]) -> torch.Tensor | None:
        found = [self.tensors[f"{module}.bias"] for module in modules if f"{module}.bias" in self.tensors]
        return torch.cat(found) if found else None

    def fused_coded(self, modules: list[str], dtype: torch.dtype, device: torch.device) -> None:
        return None


class DrawnCodes(Drawn):
    """The same, but its experts in codes, with scales and offsets that all differ."""

    def __init__(self, mixture: MixtureSpec, kind: str, hidden: int = HIDDEN) -> None:
        super().__init__(mixture, hidden)
        self.codes = {}
        for name in [name for name in self.tensors if ".experts." in name]:
            coded = random_codes(kind, self.tensors[name])
            self.codes[name.removesuffix(".weight")], self.tensors[name] = coded, coded.values(torch.float32)

    def fused_coded(
        self, modules: list[str], dtype: torch.dtype, device: torch.device
    ) -> tuple[Coded, None] | None:
        stacked = stack([self.codes[module] for module in modules]) if modules[0] in self.codes else None
        return None if stacked is None else (stacked.to(device), None)


def random_codes(kind: str, weight: torch.Tensor) -> Coded:
    """Codes like ``kind``, about as large as ``weight``; their group is the last part of its name, 0: one for all."""
    form, group = kind.split("-")
    each = int(group) or weight.shape[1]
    shape = len(weight), -(-weight.shape[1] // each)
    scales = (0.5 + torch.rand(shape)) / weight.shape[1] ** 0.5
    if form == "fp8":
        return Coded(
            (torch.randn(weight.shape) * 90).clamp(-448, 448).to(torch.float8_e4m3fn), scales / 90, each
        )
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    if form == "e2m1":
        return Coded(codes, scales / 3, each, bits=4, e2m1=True)
    zeros = torch.randint(0, 16, shape, dtype=torch.uint8)
    offsets = zeros if form == "zeros" else -8 * scales / 5
    return Coded(codes, (scales / 5).half(), each, offsets, 4)


def rows(count: int, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def make(library: str) -> Callable[..., NativeKernels]:
    def kernels(threads: int, precision: str, isa: str = "auto") -> NativeKernels:
        config = EngineConfig(model_dir="none", kernel_dir=library, weight_precision=precision, cpu_isa=isa)
        return NativeKernels(config, CPU, torch.float32, threads)

    return kernels


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("normalise", [True, False])
def test_routing_equals_transformers_router(groups: int, kept: int, normalise: bool) -> None:
    """With a correction so large that it changes the choice, and groups that leave out good experts."""
    config = Glm4MoeConfig(
        hidden_size=HIDDEN, n_routed_experts=12, num_experts_per_tok=4, n_group=groups, topk_group=kept,
        norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Glm4MoeTopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(12) / 3)
    x = rows(50)
    logits, weights, chosen = router(x)
    mixture = replace(GROUPED, groups=groups, kept_groups=kept, normalise=normalise)
    ours, shares = route(logits, mixture, router.e_score_correction_bias)
    order, ordered = chosen.sort(), ours.sort()
    assert torch.equal(order.values, ordered.values)
    torch.testing.assert_close(shares.gather(1, ordered.indices), weights.gather(1, order.indices))
    plain, _ = route(logits, replace(mixture, correction=False), None)
    assert not torch.equal(plain.sort().values, ordered.values)


def test_of_equal_scores_the_first_expert_is_chosen() -> None:
    chosen, weights = route(torch.zeros(2, 9), PLAIN, None)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 9))


@needs_compiler
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_compiled_mixture_is_the_sum_of_its_parts(make, name: str, precision: str) -> None:
    """Each expert by the kernels of dense linears; the routing is the reference's. One row, some, and many."""
    mixture = MIXTURES[name]
    kernels, checkpoint = make(2, precision), Drawn(mixture)
    mlp = kernels.load_mixture(checkpoint, mixture, "layer", "silu")
    reference = PyTorchKernels(CPU, torch.float32).load_mixture(checkpoint, mixture, "layer", "silu")

    def dense(modules: tuple[str, str, str], x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (f"layer.{module}" for module in modules)
        first, last = kernels.load_linear(checkpoint, [gate, up]), kernels.load_linear(checkpoint, [down])
        ones = torch.ones(HIDDEN)
        # A norm that changes nothing but the form.
        scaled = x / x.square().mean(-1, keepdim=True).sqrt()
        read, _ = kernels.add_norm(scaled.clone(), None, None, ones, 0.0, first)
        return last(kernels.gate(first(read), "silu", last))

    for count in (1, 5, 70):
        x = rows(count)
        x /= x.square().mean(-1, keepdim=True).sqrt()
        chosen, shares = route(reference.router(x), mixture, reference.correction)
        expected = torch.zeros_like(x)
        for expert in range(mixture.experts):
            hit = (chosen == expert).any(1)
            if hit.any():
                share = torch.where(chosen == expert, shares, 0).sum(1)[hit, None]
                expected[hit] += share * dense(mixture.names.expert(expert), x[hit])
        if mixture.shared_inner:
            part = torch.sigmoid(x @ checkpoint.raw(f"layer.{mixture.names.shared_gate}.weight").t())
            expected += part * dense(mixture.names.shared_expert(), x)
        result = mlp(x, None)
        assert (result - expected).abs().max() < 2e-5 * expected.abs().max()
        if precision == "auto":
            torch.testing.assert_close(result, reference(x, None), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize(("kind", "bits"), [("zeros-32", 4), ("zeros-0", 4), ("e2m1-32", 7), ("e2m1-16", 8)])
def test_compiled_experts_keep_their_codes(make, kind: str, bits: int) -> None:
    """Nothing but activations is rounded, to 7 bits and a sign, and what has no groups of 32 is kept in as many."""
    kernels, checkpoint = make(2, "int4"), DrawnCodes(PLAIN, kind)
    mlp = kernels.load_mixture(checkpoint, PLAIN, "layer", "silu")
    assert mlp.weights.gate_up.bits == mlp.weights.down.bits == bits
    assert kernels.rounded == (2 if bits == 8 else 0)
    x = rows(9)
    expected = PyTorchKernels(CPU, torch.float32).load_mixture(checkpoint, PLAIN, "layer", "silu")(x, None)
    assert (mlp(x, None) - expected).norm() < 0.03 * expected.norm()


@needs_compiler
def test_experts_that_are_stored_otherwise_than_the_first_are_refused(make) -> None:
    checkpoint = DrawnCodes(PLAIN, "zeros-32")
    for module in [module for module in checkpoint.codes if ".experts.4." in module]:
        checkpoint.codes[module] = random_codes("e2m1-16", checkpoint.tensors[f"{module}.weight"])
    with pytest.raises(ConfigError, match=r"experts\.4\.gate_proj is not stored like the experts before it"):
        make(1, "int4").load_mixture(checkpoint, PLAIN, "layer", "silu")


@needs_compiler
def test_compiled_biases_and_clamps_are_the_references(make) -> None:
    checkpoint = Drawn(BIASED)
    mlp = make(2, "auto").load_mixture(checkpoint, BIASED, "layer", "silu")
    reference = PyTorchKernels(CPU, torch.float32).load_mixture(checkpoint, BIASED, "layer", "silu")
    for count in (1, 70):
        expected = reference(rows(count), None)
        assert (mlp(rows(count), None) - expected).norm() < 1e-4 * expected.norm()


@needs_compiler
@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_a_rows_result_does_not_depend_on_its_neighbours_or_threads(make, precision: str) -> None:
    x, checkpoint = rows(40), Drawn(SHARED)
    whole = make(2, precision).load_mixture(checkpoint, SHARED, "layer", "silu")(x, None)
    alone = make(1, precision).load_mixture(checkpoint, SHARED, "layer", "silu")
    for row in (0, 17, 39):
        assert torch.equal(alone(x[row : row + 1].clone(), None)[0], whole[row])


@needs_compiler
def test_a_router_reads_its_weights_in_full(make) -> None:
    """Two experts whose router weights are the same in bfloat16: the better one is chosen."""
    mixture = MixtureSpec(experts=2, chosen=1, inner=40, normalise=True)
    checkpoint = Drawn(mixture)
    router = torch.ones(2, HIDDEN)
    router[1] += 2.0**-12
    checkpoint.tensors["layer.mlp.gate.weight"] = router
    for name, tensor in checkpoint.tensors.items():
        if ".experts.0." in name:
            tensor.zero_()
    result = make(1, "auto").load_mixture(checkpoint, mixture, "layer", "silu")(torch.ones(1, HIDDEN), None)
    assert result.abs().max() > 0


def change(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is not valid: it must be at most num_experts=8"),
        ({"num_experts": 4096}, "num_experts=4096 is not valid: at most 512 experts"),
        ({"num_experts": 7}, "mlp.gate.weight has shape [8, 64], and config.json says [7, 64]"),
        ({"mlp_only_layers": []}, "lacks the tensor model.layers.1.mlp.gate.weight (it has"),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(tmp_path: Path, make_engine, fields: dict, said: str) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    change(folder, **{"num_local_experts": None, "num_experts": 8, **fields})
    with pytest.raises(UnsupportedModel) as refused:
        make_engine(folder)
    assert said in str(refused.value)


def test_dense_layers_stand_where_the_family_puts_them(tmp_path: Path) -> None:
    for family, routed in (
        ("qwen3_moe", [0, 2]),
        ("qwen2_moe", [1, 3]),
        ("mixtral", [0, 1]),
        ("glm4_moe", [1, 2]),
    ):
        layers = load_spec(tiny_checkpoint(tmp_path / family, family)).layers
        assert [index for index, layer in enumerate(layers) if layer.mixture] == routed


def test_several_gpus_are_refused_by_name_where_experts_do_not_divide(tmp_path: Path) -> None:
    spec = load_spec(tiny_checkpoint(tmp_path, "qwen3_moe"))  # with an inner size of 48, and four heads
    assert not refusal(spec, 4)
    layers = tuple(
        replace(layer, mixture=replace(layer.mixture, inner=50)) if layer.mixture else layer
        for layer in spec.layers
    )
    assert "4 does not divide the inner size of its experts; use TP=2" in refusal(
        replace(spec, layers=layers), 4
    )
