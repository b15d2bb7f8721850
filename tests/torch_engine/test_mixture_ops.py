"""The GPU's kernels for mixtures against plain PyTorch: in Triton's interpreter on a CPU, on a GPU with ``-m gpu``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.kernels.reference import mixture as reference
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.mixture import MixtureSpec
from tests.packing import e2m1
from tests.tiny import tiny_checkpoint
from tests.torch_engine.test_mixture import (
    BIASED,
    GROUPED,
    HIDDEN,
    PLAIN,
    SHARED,
    Drawn,
    DrawnCodes,
    random_codes,
    rows,
)
from tests.torch_engine.test_triton_ops import DEVICE, INTERPRETED, RUNS, close, kernel

if RUNS:
    from flightline.torch_engine.kernels.gpu import cuda
    from flightline.torch_engine.kernels.gpu.activation import Activation
    from flightline.torch_engine.kernels.gpu.cuda import CudaKernels
    from flightline.torch_engine.kernels.gpu.grouped import GroupedLinear, Scratch
    from flightline.torch_engine.kernels.gpu.mixture import COUNTED, route, router_logits, sort_pairs

IDLE = 3
"""Slot of the rows that fill up a batch."""
CODED = MixtureSpec(experts=9, chosen=3, inner=64, normalise=True)
E4M3 = torch.float8_e4m3fn
INPUT_SCALE, WEIGHT_SCALE = 0.01, 0.6 / 448


class Quantised(Drawn):
    """The same weights as e4m3 codes, as a quantised checkpoint has them; routers are as before."""

    def __init__(self, mixture: MixtureSpec, hidden: int) -> None:
        super().__init__(mixture, hidden)
        self.input_scales: dict[str, torch.Tensor] = {}
        for name in self.tensors:
            if name.endswith("proj.weight"):
                codes = (self.tensors[name] / WEIGHT_SCALE).clamp(-448, 448).to(E4M3)
                self.tensors[name] = codes.float() * WEIGHT_SCALE
                # One scale for all experts, the largest, since a row is rounded once.
                self.input_scales[name] = torch.tensor(INPUT_SCALE / (4 if "experts.0." in name else 1))

    def fused_coded(
        self, modules: list[str], dtype: torch.dtype, device: torch.device
    ) -> tuple[Coded, torch.Tensor | None]:
        codes = torch.cat([self.raw(f"{module}.weight") for module in modules]) / WEIGHT_SCALE
        scales = torch.full((len(codes), 1), WEIGHT_SCALE)
        inputs = torch.stack([self.input_scales[f"{module}.weight"] for module in modules]).amax()
        return Coded(codes.to(E4M3), scales, codes.shape[1], input_scale=inputs).to(device), self.biases(
            modules
        )


class Rounding(PyTorchKernels):
    """Linears that round their inputs as e4m3 with a fixed scale."""

    def load_linear(self, checkpoint: Drawn, modules: list[str]):
        linear = super().load_linear(checkpoint, modules)
        return lambda x: linear((x / INPUT_SCALE).clamp(-448, 448).to(E4M3).float() * INPUT_SCALE)


def on_gpu(mixture: MixtureSpec, checkpoint: Drawn, dtype: torch.dtype = torch.float32):
    config = EngineConfig(
        model_dir="none", device=DEVICE.type, compute_dtype=str(dtype).removeprefix("torch.")
    )
    kernels = CudaKernels(config, DEVICE, dtype)
    kernels.multiprocessors = 200  # so many that the inputs of few rows are cut into pieces
    return kernels, kernels.load_mixture(checkpoint, mixture, "layer", "silu")


def step_of(slots: list[int]) -> SimpleNamespace:
    places = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    return SimpleNamespace(attention=SimpleNamespace(slots=places), idle=IDLE)


def run(mlp, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    return mlp(Activation(x.to(DEVICE)), step_of(slots)).float().sum(0).cpu()


@pytest.mark.parametrize("mixture", [PLAIN, GROUPED], ids=["plain", "grouped"])
class TestRouting:
    pytestmark = kernel

    def test_choice_and_weights(self, mixture: MixtureSpec) -> None:
        """Ties among them; rows of nobody choose nobody."""
        logits = torch.randn(2, 6, mixture.experts, generator=torch.Generator().manual_seed(1))
        logits[:, 2] = 0.0
        correction = torch.randn(mixture.experts) / 3 if mixture.correction else None
        expected = reference.route(logits.sum(0), mixture, correction)
        moved = None if correction is None else correction.to(DEVICE)
        slots = torch.tensor([0, 1, 2, IDLE, 5, IDLE], dtype=torch.int32, device=DEVICE)
        ids, weights = route(logits.to(DEVICE), mixture, moved, slots, IDLE)
        lives = (slots != IDLE).cpu()
        assert torch.equal(ids.cpu()[lives].long(), expected[0][lives])
        close(weights.cpu()[lives], expected[1][lives], 1e-5)
        assert (ids.cpu()[~lives] == -1).all() and (weights.cpu()[~lives] == 0).all()


class TestExperts:
    pytestmark = kernel

    @pytest.mark.parametrize("count", [1, 11])
    @pytest.mark.parametrize("kind", ["float32", "fp8"])
    @pytest.mark.parametrize("mixture", [GROUPED, SHARED, BIASED], ids=["grouped", "shared", "biased"])
    def test_like_the_reference(self, mixture: MixtureSpec, kind: str, count: int) -> None:
        """Few rows, each by itself, and many in blocks; the last two belong to nobody, and are NaN."""
        coded = kind == "fp8"
        hidden = (
            64 if coded else 264 if count == 1 else HIDDEN
        )  # in pieces, the last of which is short; and not
        if coded:  # the library's products of the shared expert want multiples of 16
            mixture = MixtureSpec(
                **{**vars(mixture), "inner": 48, "shared_inner": 32 * bool(mixture.shared_inner)}
            )
        checkpoint = Quantised(mixture, hidden) if coded else Drawn(mixture, hidden)
        plain = (Rounding if coded else PyTorchKernels)(torch.device("cpu"), torch.float32)
        expected = plain.load_mixture(checkpoint, mixture, "layer", "silu")(rows(count, hidden), None)
        x = torch.cat([rows(count, hidden), torch.full((2, hidden), torch.nan)])
        result = run(on_gpu(mixture, checkpoint)[1], x, [0] * count + [IDLE] * 2)
        close(result[:count], expected, 1e-2 if coded else 3e-5)
        if mixture.shared_inner == 0:
            assert (result[count:] == 0).all()

    @pytest.mark.parametrize(
        ("kind", "count"),
        [("fp8-32", 1), ("fp8-0", 11), ("zeros-32", 1), ("zeros-32", 11), ("minima-32", 11), ("e2m1-16", 1),
         ("e2m1-32", 11)],
    )  # fmt: skip
    def test_codes_like_the_reference(self, kind: str, count: int) -> None:
        """Whose groups are smaller than tiles and than rows; widths that end within a block."""
        checkpoint = DrawnCodes(CODED, kind, 96)
        plain = PyTorchKernels(torch.device("cpu"), torch.float32)
        expected = plain.load_mixture(checkpoint, CODED, "layer", "silu")(rows(count, 96), None)
        dtype = torch.float16 if INTERPRETED and count > 1 else torch.float32
        kernels, mlp = on_gpu(CODED, checkpoint, dtype)
        told = "FP4 W4A16" if "e2m1" in kind else "FP8" if "fp8" in kind else "W4A16"
        where = "by output" if kind == "fp8-0" else f"in groups of {kind[-2:]}"
        assert f"2 {told} {where} of experts" in kernels.describe(SimpleNamespace(quantization=None))
        x = torch.cat([rows(count, 96), torch.full((2, 96), torch.nan)]).to(dtype)
        result = run(mlp, x, [0] * count + [IDLE] * 2)
        close(result[:count], expected, 3e-5 if dtype == torch.float32 else 1e-2)
        assert (result[count:] == 0).all()

    @pytest.mark.parametrize("faster", [64, 128])
    def test_outputs_of_a_program_are_timed(self, faster: int, monkeypatch) -> None:
        """One row gets the same from either; the faster is taken by all layers."""
        kernels, mlp = on_gpu(CODED, DrawnCodes(CODED, "e2m1-32", 96))
        _, other = on_gpu(CODED, DrawnCodes(CODED, "e2m1-32", 96))
        seen = {}

        def seconds(tried) -> float:
            seen[mlp.few_outputs] = run(mlp, rows(1, 96), [0])
            return 1e-6 if mlp.few_outputs == other.few_outputs == faster else 2e-6

        monkeypatch.setattr(cuda, "_by_kind", lambda layers: {})
        monkeypatch.setattr(cuda, "BLOCK_ROWS", {8: 16})  # blocks of more rows take seconds each
        monkeypatch.setattr(cuda, "graph_seconds", seconds)
        kernels.tune([SimpleNamespace(mlp=mlp), SimpleNamespace(mlp=other)])
        assert mlp.few_outputs == other.few_outputs == faster
        assert ("experts of one row: 1.0 -> 0.5 us" in kernels._tuning) == (faster == 128)
        close(seen[128], seen[64], 1e-5)

    def test_rows_of_a_block_are_timed(self, monkeypatch) -> None:
        """For each number of pairs that an expert has; what is faster is taken by all layers, and said."""
        kernels, mlp = on_gpu(CODED, DrawnCodes(CODED, "e2m1-32", 96))
        _, other = on_gpu(CODED, DrawnCodes(CODED, "e2m1-32", 96))
        usual, asked = dict(mlp.block_rows), []
        faster = usual | {16: 32, 96: 128}
        for each in (mlp, other):
            monkeypatch.setattr(each, "try_many", lambda routes: asked.append(len(routes)))

        def seconds(tried) -> float:
            assert mlp.block_rows == other.block_rows
            tried()
            pairs = asked[-1] * CODED.chosen // CODED.experts
            return 1e-6 if mlp.block_rows[pairs] == faster[pairs] else 2e-6

        monkeypatch.setattr(cuda, "graph_seconds", seconds)
        kernels._tune_blocks([mlp, other])
        assert mlp.block_rows == other.block_rows == faster
        assert {pairs: mlp.rows_of_block(pairs * CODED.experts) for pairs in usual} == faster
        assert mlp.rows_of_block(97 * CODED.experts) == 128
        assert kernels._tuning == "".join(f"; experts of {rows} rows: 1.0 -> 0.5 us" for rows in (48, 288))

    def test_experts_of_several_kinds_are_refused(self) -> None:
        checkpoint = DrawnCodes(CODED, "zeros-32", 96)
        for module in [module for module in checkpoint.codes if ".experts.4." in module]:
            checkpoint.codes[module] = random_codes("fp8-32", checkpoint.tensors[f"{module}.weight"])
        with pytest.raises(ConfigError, match=r"experts\.4\.gate_proj is not stored like"):
            on_gpu(CODED, checkpoint)

    def test_every_e2m1_number(self) -> None:
        coded = Coded(torch.arange(16).repeat(16, 2).byte(), torch.ones(16, 2), 16, bits=4, e2m1=True)
        for dtype in (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16):
            linear = GroupedLinear(coded.to(DEVICE), None, dtype, Scratch(dtype, DEVICE), 1)
            one = torch.eye(32, device=DEVICE, dtype=dtype)
            assert torch.equal(
                linear(Activation(one)).sum(0)[:16, 0].cpu(), torch.tensor(list(map(e2m1, range(16))))
            )
            assert torch.equal(linear.weight().float().cpu(), coded.values(torch.float32))

    def test_pairs_are_sorted_into_blocks(self) -> None:
        """An expert that all rows hit, one that nobody does, and rows of nobody."""
        ids = torch.tensor([[4, 0], [4, 2], [-1, -1], [4, 5], [4, 0]], dtype=torch.int32, device=DEVICE)
        done = sort_pairs(ids, 6, 2)
        flat, seen = ids.flatten().tolist(), []
        for expert, pairs in zip(done.experts.tolist(), done.order.view(-1, 2).tolist(), strict=True):
            real = [pair for pair in pairs if pair < len(flat)]
            assert all(flat[pair] == expert for pair in real) and (bool(real) == (expert != -2))
            seen += real
        assert sorted(seen) == list(range(len(flat)))
        assert done.experts.tolist()[:6] == [0, 2, 4, 4, 5, -1]

    def test_many_pairs_are_sorted_by_several_programs(self) -> None:
        ids = torch.randint(-1, 40, (301, 2), dtype=torch.int32, device=DEVICE)
        done = sort_pairs(ids, 40, 16)
        flat, owners = ids.flatten().cpu(), done.experts.tolist()
        assert len(owners) > 2 * COUNTED
        used = -(-torch.bincount(flat + 1, minlength=41) // 16)
        expected = [expert for expert in [*range(40), -1] for _ in range(used[expert + 1])]
        assert owners == expected + [-2] * (len(owners) - len(expected))
        places = done.order.cpu().view(-1, 16)
        pairs = places[places < len(flat)]
        assert sorted(pairs.tolist()) == list(range(len(flat))) and places.max() == len(flat)
        for expert, place in zip(owners, places, strict=True):
            assert (flat[place[place < len(flat)]] == expert).all()

    @pytest.mark.parametrize("count", [3, 16, 17, 70])
    def test_routers_of_any_number_of_rows(self, count: int) -> None:
        """In partial sums, as many as fill the device."""
        x, weight = torch.randn(count, 600, device=DEVICE), torch.randn(40, 600, device=DEVICE)
        logits = router_logits(x, weight)
        assert logits.shape == (2, count, 40)
        close(logits.sum(0), x @ weight.t(), 1e-5)

    def test_greedy_tokens_equal(self, tmp_path, make_engine) -> None:
        """An engine whose steps have few rows and many, padded ones too where there are graphs."""
        folder = tiny_checkpoint(tmp_path, "qwen2_moe", num_hidden_layers=2)
        requests = [GenerationRequest(prompt, 2, end_id=-1) for prompt in ([5, 6, 7], list(range(20, 33)))]
        expected = [output.token_ids for output in make_engine(folder).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        assert [output.token_ids for output in engine.generate(requests)] == expected
