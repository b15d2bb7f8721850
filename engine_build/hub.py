"""Fetching a checkpoint from the Hugging Face hub, with every failure as one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import TOKENIZER_FILES

CONFIG_FILES = ("config.json", "generation_config.json", "hf_quant_config.json")
WEIGHT_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")


def fetch(model_id: str, check: Any) -> Path:
    """Downloads a model into the hub's own cache and returns its folder.

    Args:
        model_id: ``owner/name``.
        check: called with the folder once the small files are there, before the weights are fetched; raises
            ``BuildError`` for a model that cannot be used.

    Raises:
        BuildError: offline, not found, gated, refused, or ``check`` said so.
    """
    fetch_configuration(model_id, check)
    return _download(model_id, [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_PATTERNS])


def fetch_configuration(model_id: str, check: Any) -> Path:
    """The small files of a model, checked; raises as :func:`fetch`."""
    folder = _download(model_id, [*CONFIG_FILES, *TOKENIZER_FILES])
    check(folder)
    return folder


def _download(model_id: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise BuildError(
            f"MODEL={model_id} is gated: accept its licence on its hub page, then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BuildError(
            f"MODEL={model_id} was not found on the hub: check the id, or set HF_TOKEN if it is private"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        # The client first looks for a cached copy; what stopped it from asking the hub is the cause.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _http_error(model_id, error.__cause__) from None
        raise BuildError(
            f"MODEL={model_id} is not in the local cache and the hub cannot be reached: "
            "go online, or give a local folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _http_error(model_id, error) from None
    except errors.HFValidationError as error:
        raise BuildError(f"MODEL={model_id} is not a valid hub id ({error})") from None


def _http_error(model_id: str, error: Any) -> BuildError:
    status = error.response.status_code
    if status in (401, 403):
        return BuildError(f"MODEL={model_id}: the hub refused access (HTTP {status}): set a valid HF_TOKEN")
    return BuildError(f"MODEL={model_id}: the hub failed (HTTP {status}): try again later")
