"""Reads a checkpoint folder's safetensors, dequantising FP8 where the device computes in another dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flightline.torch_engine.model.coded import Coded, stack
from flightline.torch_engine.model.families import ModelSpec, UnsupportedModel
from flightline.torch_engine.model.int4 import read_int4
from flightline.torch_engine.model.layout import check_tensors
from flightline.torch_engine.model.quantization import (
    BESIDE_CODES,
    BESIDE_INT4,
    BLOCK,
    FP8,
    INPUT_SCALES,
    KV_SCALES,
    WEIGHT_SCALES,
    Stored,
    codes_of,
)


class Checkpoint:
    """Tensors by their Hugging Face names, read when asked for.

    Raises UnsupportedModel on construction if a file is damaged, or a tensor missing, misshapen or foreign.
    """

    def __init__(self, model_dir: str | Path, spec: ModelSpec) -> None:
        self.folder = Path(model_dir)
        self.spec = spec
        self._open: dict[str, Any] = {}
        self._files = self._locate()
        check_tensors(spec, {name: self._stored(name) for name in self._files}, self.folder)

    def _locate(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): str(file) for name, file in files.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnsupportedModel(
                    f"{index} is damaged ({error!r}): fetch the checkpoint again"
                ) from None
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise UnsupportedModel(
                f"{self.folder} has no model.safetensors (nor its index): convert it to safetensors"
            )
        return dict.fromkeys(self._file(single.name).keys(), single.name)

    def _file(self, name: str) -> Any:
        """The open file, with every failure in one line."""
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(name, error) from None
        return self._open[name]

    def _damaged(self, name: str, error: Exception) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.folder / name} is missing or damaged ({error}): fetch the checkpoint again"
        )

    def _stored(self, name: str) -> Stored:
        file = self._files[name]
        try:
            entry = self._file(file).get_slice(name)
            return Stored(entry.get_dtype(), tuple(entry.get_shape()))
        except SafetensorError as error:
            raise self._damaged(file, error) from None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def raw(self, name: str) -> torch.Tensor:
        """Raises UnsupportedModel if the checkpoint lacks the tensor."""
        if name not in self._files:
            raise UnsupportedModel(f"{self.folder} lacks the tensor {name}")
        return self._tensor(name)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file(self._files[name]).get_tensor(name)
        return tensor

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        """``<module>.weight`` [N, K] in ``dtype``; codes times their scales."""
        coded = self.coded(module)
        return self.raw(f"{module}.weight").to(dtype) if coded is None else coded.values(dtype)

    def coded(self, module: str) -> Coded | None:
        """``<module>.weight`` as it is stored; None if that is in plain numbers."""
        return self._codes(module)

    def _codes(self, module: str) -> Coded | None:
        """As :meth:`coded`, by the file's own name.

        Loaders that ignore the scales run garbage without an error (Transformers does), so codes without a scale are
        refused.
        """
        quantization = self.spec.quantization
        packed = codes_of(module, quantization)
        if packed in self._files and quantization is not None:

            def read(leaf: str) -> torch.Tensor | None:
                return self._tensor(f"{module}.{leaf}") if f"{module}.{leaf}" in self._files else None

            return read_int4(read, quantization, module)
        if f"{module}.weight" not in self._files or self._stored(f"{module}.weight").dtype != FP8:
            return None
        scales = self._beside(module, WEIGHT_SCALES)
        if scales is None or quantization is None:
            raise UnsupportedModel(
                f"{self.folder}: {module}.weight is FP8 but has no weight_scale: build it again"
            )
        codes, input_scale = self._tensor(f"{module}.weight"), None
        rows, inputs = codes.shape
        if quantization.blocks:
            return Coded(codes, scales.repeat_interleave(BLOCK, 0)[:rows], BLOCK)
        if quantization.static:
            input_scale = self._beside(module, INPUT_SCALES)
        scales = scales.reshape(-1, 1).expand(rows, 1).contiguous()
        known = None if input_scale is None else input_scale.reshape(())
        return Coded(codes, scales, inputs, input_scale=known)

    def _beside(self, module: str, leaves: tuple[str, ...]) -> torch.Tensor | None:
        """The first of a module's tensors by these names, in float32."""
        found = (f"{module}.{leaf}" for leaf in leaves if f"{module}.{leaf}" in self._files)
        name = next(found, None)
        return None if name is None else self._tensor(name).float()

    def codes(self) -> Iterator[tuple[str, Coded]]:
        """The modules that are stored as codes, by the file's names, one at a time."""
        for module in dict.fromkeys(name.rpartition(".")[0] for name in self._files):
            if (coded := self._codes(module)) is not None:
                yield module, coded

    def plain_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """What an unquantised checkpoint would hold, by the file's names, one tensor at a time; codes in ``dtype``."""
        packing = self.spec.quantization.packing if self.spec.quantization else ""
        beside = (*BESIDE_INT4.get(packing, BESIDE_CODES), *KV_SCALES)
        for module, coded in self.codes():
            yield f"{module}.weight", coded.values(dtype)
        for name in self._files:
            module, _, leaf = name.rpartition(".")
            if leaf not in beside and not (leaf == "weight" and self._stored(name).dtype == FP8):
                yield name, self._tensor(name)

    def bias(self, module: str, dtype: torch.dtype) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.raw(name).to(dtype) if name in self._files else None

    def kv_scales(self, attention: str) -> tuple[float, float]:
        """What keys and values of the module ``attention`` are divided by in an e4m3 cache; 1 where nobody calibrated.

        Names of ModelOpt (``k_proj.k_scale``) and of compressed-tensors (``k_scale``).
        """
        scales = []
        for module, name in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
            stored = next(
                (n for n in (f"{attention}.{module}.{name}", f"{attention}.{name}") if n in self), None
            )
            scale = float(self.raw(stored).float()) if stored else 1.0
            if not 0 < scale < math.inf:
                raise UnsupportedModel(
                    f"{self.folder}: {stored} is {scale}: it must be positive, fetch the checkpoint again"
                )
            scales.append(scale)
        return scales[0], scales[1]

    def fused(self, modules: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights of several linears stacked along the output, and their biases if they have any."""
        return torch.cat([self.weight(module, dtype) for module in modules]), self._biases(modules, dtype)

    def fused_coded(
        self, modules: list[str], dtype: torch.dtype, device: torch.device
    ) -> tuple[Coded, torch.Tensor | None] | None:
        """As :meth:`fused`, with the weights as they are stored; None if they are not, or not alike."""
        parts = [self.coded(module) for module in modules]
        coded = [part.to(device) for part in parts if part is not None]
        if len(coded) != len(parts) or (stacked := stack(coded)) is None:
            return None
        bias = self._biases(modules, dtype)
        return stacked, None if bias is None else bias.to(device)

    def _biases(self, modules: list[str], dtype: torch.dtype) -> torch.Tensor | None:
        biases = [self.bias(module, dtype) for module in modules]
        present = [bias for bias in biases if bias is not None]
        if present and len(present) != len(biases):
            raise UnsupportedModel(f"{self.folder}: only some of {', '.join(modules)} have a bias")
        return torch.cat(present) if present else None
