"""The Hugging Face folder format: its files, its shards, and spellings that old and new readers share."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightline.engine_build.errors import BuildError
from flightline.torch_engine.model.quantization import Stored

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        BuildError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{path} is missing: MODEL must be a Hugging Face checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is damaged ({error}): fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise BuildError(f"{path} is damaged (not a JSON object): fetch the checkpoint again")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not.

    Raises:
        BuildError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise BuildError(f"{index} is damaged (no weight_map): fetch the checkpoint again")
        files = sorted({folder / name for name in named.values()})
        for path in files:
            if not path.exists():
                raise BuildError(f"{path} is missing but {index.name} names it: fetch the checkpoint again")
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BuildError(f"{folder} has no model*.safetensors: convert the weights to safetensors first")
    return files


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Tensor name to dtype and shape, from the safetensors headers alone.

    Raises:
        BuildError: a header is damaged or the file is cut short.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError("cut short")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if path.stat().st_size != 8 + length + end:
                raise ValueError("cut short")
            stored |= {name: Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BuildError(f"{path} is damaged ({error}): fetch the checkpoint again") from None
    return stored


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of a checkpoint, sharded or not, one at a time."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def write_tensors(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = 2 << 30
) -> None:
    """Writes safetensors files of about ``shard_bytes``, and an index if there are several; holds one in memory."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = size = count = 0

    def close() -> None:
        nonlocal shard, size, count
        count += 1
        name = f"model-{count:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            close()
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close()
    if count == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)


def with_both_rope_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with ``rope_parameters`` (Transformers 5) and ``rope_theta``, ``rope_scaling`` (before).

    A reader that knows only the other spelling falls back to ``rope_theta`` 10000 without a word.
    """
    config = dict(config)
    new = config.get("rope_parameters")
    if not new:
        theta = config.get("rope_theta", 10000.0)
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        new = {"rope_theta": theta, "rope_type": kind, **scaling}
        local = config.get("rope_local_base_freq")
        if local is not None:  # Gemma 3: its sliding layers turn at their own frequency
            new = {
                "full_attention": new,
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            }
        config["rope_parameters"] = new
    main = new.get("full_attention", new)
    config["rope_theta"] = main.get("rope_theta", 10000.0)
    if "sliding_attention" in new and config.get("model_type") != "olmo3":  # which has no such key
        config["rope_local_base_freq"] = new["sliding_attention"].get("rope_theta", 10000.0)
    if main.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in main.items() if key != "rope_theta"}
    return config


def with_common_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` that Transformers 4.57 (TensorRT-LLM's) and 5 both read."""
    config = dict(config)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.57 expects a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
