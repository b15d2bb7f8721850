"""NVIDIA's Triton containers that we serve from, newest first, and which one a driver runs.

Driver 575 had 25.10 (TensorRT-LLM 1.0.0), which is not among them: tritonclient needs protobuf 6.33.5 of January 2026,
newer than anything in that image, so its Python packages were never meant for it.

``python3 -m flightline.engine_build.trtllm.containers`` prints the image for this host; it needs nothing but Python.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from flightline.engine_build.trtllm import host


@dataclass(frozen=True)
class Container:
    """One image. Versions as NVIDIA's compatibility table lists them."""

    tag: str
    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: tuple[int, ...]
    """The driver that the table names; data-centre GPUs may run it on an older one (CUDA compatibility)."""

    @property
    def image(self) -> str:
        return f"nvcr.io/nvidia/tritonserver:{self.tag}-trtllm-python-py3"


CONTAINERS = (
    Container("26.06", "1.2.1", "10.14.1.48", "13.1", (590, 44, 1)),
    Container("26.02", "1.1.0", "10.13.3.9", "13.0", (580, 95, 5)),
)


def driver_version(text: str) -> tuple[int, ...]:
    """``590.44.01`` -> ``(590, 44, 1)``."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def newest_for(driver: tuple[int, ...]) -> Container | None:
    """The newest container whose listed driver branch is not newer than ``driver``; None for older drivers."""
    # The branch decides: NVIDIA's table names one build of it.
    return next((each for each in CONTAINERS if driver[:1] >= each.driver[:1]), None)


def main() -> int:
    """Prints the image, or says why there is none."""
    found = host.gpus()
    if not found:
        print("error: no NVIDIA GPU is visible (nvidia-smi)", file=sys.stderr)
        return 1
    driver = found[0].driver
    container = newest_for(driver_version(driver))
    if container is None:
        oldest = CONTAINERS[-1]
        print(
            f"error: driver {driver} is older than {oldest.driver[0]}, which {oldest.image} wants: update the driver",
            file=sys.stderr,
        )
        return 1
    print(container.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
