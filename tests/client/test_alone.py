"""The client's own wheel, in an environment with its declared dependencies and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flightline import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "client/pyproject.toml").read_text(encoding="utf-8"))["project"]
PROGRAM = """
import importlib.util, json, sys
from flightline.client import Client, GenerateParams
with Client(sys.argv[1], model_dir=sys.argv[2]) as client:
    answer = client.generate("hello", GenerateParams(max_tokens=3))
    prompt = client.render_chat([{"role": "user", "content": "hi"}])
others = ["torch", "transformers", "flightline.engine_build", "flightline.loadtest", "client"]
found = [name for name in others if importlib.util.find_spec(name)]
print(json.dumps({"tokens": answer.num_output_tokens, "prompt": prompt, "others": found}))
"""


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Installed distributions that the requirements bring, theirs included, by name."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        distribution = importlib.metadata.distribution(wanted.name)
        assert wanted.specifier.contains(distribution.version, prereleases=True), wanted
        found[wanted.name.lower()] = distribution
        for text in distribution.requires or []:
            more = Requirement(text)
            extras = wanted.extras or {""}
            applies = more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras)
            if applies and more.name.lower() not in found:
                todo.append(more)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    folder = tmp_path_factory.mktemp("alone")
    source = folder / "client"
    source.mkdir()
    for path in (ROOT / "client").iterdir():
        if path.suffix in (".py", ".toml", ".md", ".typed"):
            (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    for distribution in closure(PROJECT["dependencies"]).values():
        for top in {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *wheel], check=True)
    (built,) = folder.glob("*.whl")
    pip += ["--python", str(folder / "env")]
    subprocess.run([*pip, "install", "--no-deps", str(built)], check=True)
    check = subprocess.run([*pip, "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    return folder / "env/bin/python"


@pytest.mark.slow
def test_an_app_gets_the_client_and_no_torch(python: Path, server, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "<{{ messages[0].content }}>"})
    )
    command = [str(python), "-c", PROGRAM, server.url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env={})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"tokens": 3, "prompt": "<hi>", "others": []}


@pytest.mark.slow
def test_its_command_line(python: Path, server, tmp_path: Path) -> None:
    command = [str(python), "-m", "flightline.client", "hello", "--max-tokens=3", "--json"]
    port = server.url.rsplit(":", 1)[1]
    environment = {"FLIGHTLINE_GRPC_PORT": port, "GRPC_PORT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_output_tokens"] == 3


def test_it_is_of_the_projects_version() -> None:
    assert PROJECT["version"] == __version__
