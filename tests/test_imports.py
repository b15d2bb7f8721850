"""Imports run one way: what is below knows nothing of what is above.

Every ``import`` statement counts, wherever it stands: in a function, and under ``TYPE_CHECKING`` too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import flightline

PACKAGE = Path(flightline.__file__).parent
PARTS = [
    path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py" if path.stem[0] != "_"
]
"""Folders and files of the package."""
ENGINE = (
    *(
        "text",
        "core",
        "parallel",
        "model",
        "kernels",
        "host_blocks",
        "runner",
        "cuda_runner",
        "loading",
        "engine",
        "process",
    ),
)
"""Folders and files of ``torch_engine``, the lowest first: each may import those before it."""
KERNELS = ("reference", "cpu", "gpu")


def imports(part: str) -> Iterator[tuple[str, str]]:
    """Each module of a part with each of this project's that it imports; names without ``flightline.``."""
    # `flightline/` holds links, which rglob does not follow: hence the resolved folder.
    root = (PACKAGE / part).resolve()
    for path in root.rglob("*.py") if root.is_dir() else [PACKAGE / f"{part}.py"]:
        module = ".".join((part, *path.relative_to(root).with_suffix("").parts)) if root.is_dir() else part
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if name.startswith("flightline."):
                    yield module, name.removeprefix("flightline.")


def test_folders_import_one_way() -> None:
    graph = {part: {imported.split(".")[0] for _, imported in imports(part)} - {part} for part in PARTS}
    assert graph["supervisor"] and graph["loadtest"], "the imports were not found"
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_engines_folders_import_one_way() -> None:
    found = 0
    for module, imported in imports("torch_engine"):
        if not imported.startswith("torch_engine."):
            continue
        importer, target = module.split(".")[1], imported.split(".")[1]
        if importer == "__init__":
            continue
        assert ENGINE.index(target) <= ENGINE.index(importer), f"{module} imports {imported}"
        found += 1
    assert found > 100, "the imports were not found"


def test_what_the_server_reads_of_the_client_loads_no_grpc() -> None:
    program = "import sys, flightline.model_repository.shared.tensors; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_implementation_of_the_kernels_imports_no_other() -> None:
    for module, imported in imports("torch_engine"):
        own, other = module.split(".")[2:3], imported.split(".")[2:3]
        if "torch_engine.kernels." in module and "torch_engine.kernels." in imported and own[0] in KERNELS:
            assert other[0] not in KERNELS or other == own, f"{module} imports {imported}"
