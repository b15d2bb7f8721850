"""Reads a checkpoint folder's safetensors, dequantising FP8 where the device computes in another dtype."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flightline.torch_engine.model.coded import Coded, stack
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.int4 import read_int4
from flightline.torch_engine.model.layout import LAYER, check_tensors, plain_names, rows_of
from flightline.torch_engine.model.mxfp4 import read_mxfp4
from flightline.torch_engine.model.quantization import (
    BESIDE_CODES,
    BESIDE_INT4,
    BLOCK,
    FP8,
    INPUT_SCALES,
    KV_SCALES,
    PACKED,
    WEIGHT_SCALES,
    Stored,
    codes_of,
)
from flightline.torch_engine.model.shard import WHOLE, Part, Shard
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.stacked import STACKED_CODES, Place, place_of


class Checkpoint:
    """Tensors by the names that Llama has for them, whatever the file calls them, read when asked for.

    What the file stores together is taken apart, and the rows of queries and keys come in the order that the
    kernels' rotary embedding wants (:func:`layout.head_order`). Of a :meth:`part`, what its rank has of them.

    Raises UnsupportedModel on construction if a file is damaged, or a tensor missing, misshapen or foreign.
    """

    def __init__(self, model_dir: str | Path, spec: ModelSpec) -> None:
        self.folder = Path(model_dir)
        self.spec = self.whole = spec
        """``whole`` is the model's, ``spec`` that of the decoder whose part this is."""
        self.shard = Shard()
        self._open: dict[str, Any] = {}
        self._files = self._locate()
        self._names = plain_names(self._files, spec, self.folder)
        check_tensors(spec, {name: self._stored(name) for name in self._files}, self.folder)

    def part(self, shard: Shard) -> Checkpoint:
        """The same for one rank, with the spec of its decoder.

        Raises:
            UnsupportedModel: the model cannot be cut like that.
        """
        part = copy.copy(self)
        part.shard, part.spec = shard, shard.of(self.whole)
        return part

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files itself."""
        return {**self.__dict__, "_open": {}}

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
        return self._find(name) is not None and not self._part(name).absent

    def _find(self, name: str) -> str | None:
        """The file's name of a tensor: its own, or that of the module which it is stored with."""
        if name not in self._names:
            module, _, leaf = name.rpartition(".")
            if (place := self._place(module)) is not None:
                name = place.tensor if leaf == "weight" else f"{place.tensor}_{leaf}"
            else:
                rows = rows_of(self.whole, module)
                name = name if rows is None else f"{rows.module}.{leaf}"
        return self._names.get(name)

    def _place(self, module: str) -> Place | None:
        """Where the module of an expert is, if all experts' are stored together."""
        layer = LAYER.match(module)
        mixture = None if layer is None else self.whole.layers[int(layer.group(1))].mixture
        return place_of(module) if mixture is not None and mixture.stacked else None

    def _part(self, name: str) -> Part:
        """What this rank has of a tensor that is there."""
        stored = self._find(name)
        if self.shard.size == 1 or stored is None:
            return WHOLE
        return self.shard.part(name, self._stored(stored).shape, self.whole)

    def raw(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype; of one with a row for each output, the rows of the module that was asked for.

        Raises UnsupportedModel if the checkpoint lacks it.
        """
        stored = self._find(name)
        if stored is None:
            raise UnsupportedModel(f"{self.folder} lacks the tensor {name}")
        file, part = self._file(self._files[stored]), self._part(name)
        if (place := self._place(name.rpartition(".")[0])) is not None:
            return self._of_expert(file.get_slice(stored), place, part)
        shape = self._stored(stored).shape
        where = rows_of(self.whole, name.rpartition(".")[0])
        if where is not None and (not shape or shape[0] != where.total):
            where = None  # a scale of the whole
        if where is None and part == WHOLE:
            whole: torch.Tensor = file.get_tensor(stored)
            return whole
        start, stop = (0, shape[0]) if where is None else (where.start, where.stop)
        begin, end = part.rows or (0, stop - start)
        rows, entry = slice(start + begin, start + end), file.get_slice(stored)
        own: torch.Tensor = entry[rows, slice(*part.columns)] if part.columns else entry[rows]
        return own if where is None or where.order is None else _ordered(own, where.order)

    @staticmethod
    def _of_expert(entry: Any, place: Place, part: Part) -> torch.Tensor:
        """A weight [N, K] or bias [N] out of all experts', whose outputs come last."""
        own = entry[place.expert : place.expert + 1][0].movedim(-1, 0)[place.outputs]
        own = own[slice(*part.rows)] if part.rows else own
        own = own[:, slice(*part.columns)] if part.columns else own
        expert: torch.Tensor = own.contiguous()
        return expert

    def _tensor(self, name: str) -> torch.Tensor:
        """By the file's own name."""
        tensor: torch.Tensor = self._file(self._files[name]).get_tensor(name)
        return tensor

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        """``<module>.weight`` [N, K] in ``dtype``; codes times their scales."""
        coded = self.coded(module)
        return self.raw(f"{module}.weight").to(dtype) if coded is None else coded.values(dtype)

    def coded(self, module: str) -> Coded | None:
        """``<module>.weight`` as it is stored; None if that is in plain numbers."""
        where = rows_of(self.whole, module)
        coded = self._codes(module if where is None else where.module)
        if coded is None:
            return None
        part = self.shard.part(f"{module}.weight", tuple(coded.codes.shape), self.whole)
        if where is None and part == WHOLE:
            return coded
        start, stop = (0, len(coded.codes)) if where is None else (where.start, where.stop)
        begin, end = part.rows or (0, stop - start)
        if where is None or where.order is None:
            own = coded.rows(slice(start + begin, start + end))  # what lies in the file is not copied
        else:
            own = coded.rows(_ordered(torch.arange(start + begin, start + end), where.order))
        if part.columns is None:
            return own
        cut = own.columns(*part.columns)
        if cut is None:
            raise UnsupportedModel(
                f"{self.folder}: {module} cannot be shared by {self.shard.size} GPUs: inputs of one scale would lie on "
                "two; use TP=1"
            )
        return cut

    def _codes(self, module: str) -> Coded | None:
        """Of a whole module as the file has it, by its name in a model without a wrapper.

        Loaders that ignore the scales run garbage without an error (Transformers does), so codes without a scale are
        refused.
        """

        if (place := self._place(module)) is not None:
            return self._expert_codes(place)

        def read(leaf: str) -> torch.Tensor | None:
            name = self._names.get(f"{module}.{leaf}")
            return None if name is None else self._tensor(name)

        def first(leaves: tuple[str, ...]) -> torch.Tensor | None:
            return next((tensor.float() for leaf in leaves if (tensor := read(leaf)) is not None), None)

        quantization, weight = self.spec.quantization, self._names.get(f"{module}.weight")
        packed = self._names.get(codes_of(module, quantization) or "")
        if quantization is not None and packed is not None and self._stored(packed).dtype in PACKED:
            return read_int4(read, quantization, module)
        if weight is None or self._stored(weight).dtype != FP8:
            return None
        scales = first(WEIGHT_SCALES)
        if scales is None or quantization is None:
            raise UnsupportedModel(
                f"{self.folder}: {module}.weight is FP8 but has no weight_scale: build it again"
            )
        codes = self._tensor(weight)
        rows, inputs = codes.shape
        if quantization.blocks:
            return Coded(codes, scales.repeat_interleave(BLOCK, 0)[:rows], BLOCK)
        known = first(INPUT_SCALES) if quantization.static else None
        scales = scales.reshape(-1, 1).expand(rows, 1).contiguous()
        return Coded(codes, scales, inputs, input_scale=None if known is None else known.reshape(()))

    def _expert_codes(self, place: Place) -> Coded | None:
        stored = [self._names.get(f"{place.tensor}_{leaf}") for leaf in STACKED_CODES]
        names = [name for name in stored if name is not None]
        if len(names) < len(stored):
            return None
        entries = [self._file(self._files[name]).get_slice(name) for name in names]
        blocks, exponents = (
            entry[place.expert : place.expert + 1][0][place.outputs].contiguous() for entry in entries
        )
        return read_mxfp4(blocks, exponents)

    def codes(self) -> Iterator[tuple[str, Coded]]:
        """The modules that are stored as codes, as the file has them, one at a time."""
        for module in dict.fromkeys(name.rpartition(".")[0] for name in self._names):
            if (coded := self._codes(module)) is not None:
                yield module, coded

    def plain_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """What an unquantised checkpoint without a wrapper would hold, one tensor at a time; codes in ``dtype``."""
        packing = self.spec.quantization.packing if self.spec.quantization else ""
        beside = (*BESIDE_INT4.get(packing, BESIDE_CODES), *KV_SCALES)
        for module, coded in self.codes():
            yield f"{module}.weight", coded.values(dtype)
        for plain, name in self._names.items():
            leaf = plain.rpartition(".")[2]
            if leaf == "weight" and self._stored(name).dtype in (*PACKED, FP8):
                continue
            if packing == "mxfp4" and leaf.endswith(STACKED_CODES):
                if leaf.endswith(STACKED_CODES[0]):
                    tensor = name.removesuffix(f"_{STACKED_CODES[0]}")
                    yield plain.removesuffix(f"_{STACKED_CODES[0]}"), self._stacked_weight(tensor, dtype)
            elif leaf == "weight" or leaf not in beside:
                yield plain, self._tensor(name)

    def _stacked_weight(self, tensor: str, dtype: torch.dtype) -> torch.Tensor:
        """Of all experts, as a checkpoint of plain numbers has it."""
        pairs = zip(*(self._tensor(f"{tensor}_{leaf}") for leaf in STACKED_CODES), strict=True)
        return torch.stack([read_mxfp4(*pair).values(dtype).t() for pair in pairs])

    def bias(self, module: str, dtype: torch.dtype) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.raw(name).to(dtype) if name in self else None

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


def _ordered(rows: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Rows of whole heads with the dimensions of each in this order."""
    heads = rows.view(-1, len(order), *rows.shape[1:])
    if rows.dtype == torch.float8_e4m3fn:  # torch does not move e4m3 by index everywhere
        return heads.view(torch.uint8)[:, list(order)].view(rows.dtype).flatten(0, 1)
    return heads[:, list(order)].flatten(0, 1)
