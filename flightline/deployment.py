"""``deployment.json``: what a build has made, for whoever serves or measures it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "deployment.json"
PATHS = ("engine_dir", "model_dir", "source_dir", "model_repository", "manifest")
LANES = ("torch", "trtllm-pytorch", "trtllm-engine")


class DeploymentError(ValueError):
    """There is none, or it is damaged; the message is one line with the remedy."""


@dataclass(frozen=True)
class Deployment:
    """Written last by a build: it exists only for one that is whole. Folders are absolute paths."""

    model: str
    lane: str
    precision: str
    engine_dir: Path
    model_dir: Path
    """Checkpoint that the engine runs."""
    source_dir: Path
    """Checkpoint in bf16: tokenizer, chat template, baseline."""
    model_repository: Path
    manifest: Path
    """File that says what went into the engine."""
    hardware: dict[str, Any]
    """Of the build: see ``Hardware.identity``."""
    baseline: dict[str, Any] = dataclasses.field(default_factory=dict)
    """``dtype`` and ``max_batch_size`` of ``hf_baseline``."""
    world_size: int = 1
    """GPUs of one engine."""
    dp: int = 1
    """Engine processes, each on GPUs of its own."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.hardware["device"]

    def text(self) -> str:
        """The file's content."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def load(cls, build_dir: Path) -> Deployment:
        """Raises DeploymentError: not built, damaged, or of a backend that this version does not have."""
        path = build_dir / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            paths = {name: Path(values[name]) for name in PATHS}
            found = cls(**{**values, **paths})
            found.hardware["device"]
        except FileNotFoundError:
            raise DeploymentError(f"{path} does not exist: run 'make build-engines' first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeploymentError(f"{path} is damaged ({error!r}): run 'make build-engines' again") from None
        if type(found.dp) is not int or found.dp < 1:
            raise DeploymentError(
                f"dp={found.dp!r} of {path} is not valid: it must be a whole number of at least 1, "
                "run 'make build-engines' again"
            )
        for folder in (found.engine_dir, found.model_repository):
            if not folder.is_dir():
                raise DeploymentError(
                    f"{folder}, named by {path}, does not exist: run 'make build-engines' again"
                )
        if found.lane not in LANES:
            raise DeploymentError(
                f"backend {found.lane} of {path} is unknown: run 'make build-engines' again"
            )
        return found
