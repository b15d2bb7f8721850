"""The container files, by the tools of their field: hadolint, shellcheck, Compose itself, PromQL's grammar.

Nothing here needs a docker daemon. What these tools do not see (a build argument lost after FROM, a path that is not
there, a metric that nobody exports) is checked by hand.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from flightline.supervisor import triton
from flightline.supervisor.serve import Server, ServeSettings
from flightline.supervisor.settings import ServeError
from tests.answering import answering
from tests.model_repository.endpoints import ask

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPTS = [
    *sorted(DOCKER.glob("*.sh")),
    ROOT / ".ci/run",
    ROOT / "tests/debian.sh",
    ROOT / "tests/helm.sh",
    ROOT / "deploy/lint.sh",
    ROOT / "benchmarks/gpu_all.sh",
]
PROFILES = ["cpu", "gpu", "loadtest", "observability", "dcgm"]
DASHBOARD = DOCKER / "grafana/dashboards/flightline.json"


def tool(name: str) -> str:
    """A program of the development environment."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is missing: pip install -e '.[dev]'"
    return found


def check(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    check(tool("hadolint"), path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    check(tool("shellcheck"), path)
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_argument_is_lost_after_from(path: Path) -> None:
    """An ARG before FROM is empty after it, and hadolint does not say so."""
    before, after = re.split(r"^FROM .*$", path.read_text(encoding="utf-8"), maxsplit=1, flags=re.M)
    for name in re.findall(r"^ARG (\w+)", before, flags=re.M):
        assert not re.search(rf"\$\{{?{name}\b", after), f"{name} is empty there: declare it again"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    let_in = path.with_name(f"{path.name}.dockerignore").read_text(encoding="utf-8").split()
    for line in re.findall(r"^COPY (.+)$", path.read_text(encoding="utf-8"), flags=re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in let_in, f"{source} is ignored"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_nobody_special_from_a_pinned_base(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", text, flags=re.M)[-1] == "1000:1000"
    base = re.search(r"^FROM (.+)$", text, flags=re.M)[1].replace(
        "${IMAGE}", re.search(r"IMAGE=(\S+)|$", text)[1] or ""
    )
    assert ":" in base and not base.endswith(":latest")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_home_is_a_folder_of_its_user_on_a_named_volume(path: Path) -> None:
    """NVIDIA's user has no home folder: FlashInfer's import fails there, and Triton's language with it."""
    text = path.read_text(encoding="utf-8")
    home = re.search(r"\bHOME=(\S+)", text)
    assert home, "HOME is not set"
    assert re.search(rf"mkdir -p [^\n]*{home[1]}\b", text) and "chown -R 1000:1000" in text
    root = "/" + home[1].split("/")[1]
    assert re.search(rf"chown -R 1000:1000[^\n]* {root}\b|chown -R 1000:1000 {root}\b", text)
    assert f'"{root}"' in re.search(r"^VOLUME (.+)$", text, flags=re.M)[1]
    services = compose(*PROFILES)["services"].values()
    mine = [each for each in services if each.get("build", {}).get("dockerfile") == f"docker/{path.name}"]
    assert mine
    for service in mine:
        (mount,) = [each for each in service["volumes"] if each["target"] == home[1]]
        assert mount["type"] == "volume" and mount["source"] and not mount.get("read_only")


def test_the_server_image_has_what_tritonclient_imports() -> None:
    """NVIDIA's image is used without resolving dependencies: each of ours must be named, as new as it is needed."""
    text = (DOCKER / "server.Dockerfile").read_text(encoding="utf-8")
    pins = {name.replace("-", "_"): version for name, version in re.findall(r"([\w-]+)==([\w.]+)", text)}
    package = Path(importlib.util.find_spec("tritonclient").submodule_search_locations[0])
    generated = (package / "grpc/model_config_pb2.py").read_text(encoding="utf-8")
    wanted = re.search(r"Protobuf Python Version: ([\d.]+)", generated)[1]
    assert _numbers(pins["protobuf"]) >= _numbers(wanted), (
        f"tritonclient refuses a protobuf older than {wanted}"
    )
    assert _numbers(pins["protobuf"])[0] == _numbers(wanted)[0]  # its rule for generated code
    assert pins["tritonclient"] == importlib.metadata.version("tritonclient")
    script = "import sys, tritonclient.grpc; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(check(sys.executable, "-c", script).split())
    of_nvidia = {"numpy", "packaging", "typing_extensions"}  # TensorRT-LLM and torch need them
    renamed = {"google": "protobuf", "grpc": "grpcio", "rapidjson": "python_rapidjson"}
    installed = importlib.metadata.packages_distributions().keys()
    others = {name for name in loaded & installed if not name.startswith("_")} - of_nvidia
    assert not {renamed.get(name, name) for name in others} - pins.keys()
    assert "import model_config_pb2" in text.split("RUN ")[1], "the build does not try the import"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_pins_are_the_projects() -> None:
    """The images install what the project pins; the server's image names versions of its own for what NVIDIA lacks."""
    import tomllib

    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    versions = dict(re.split(r"(?:\[\w+\])?==", pin) for pin in pins)
    text = (DOCKER / "server.Dockerfile").read_text(encoding="utf-8")
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", text):
        assert versions.get(name, version) == version, name


def compose(*profiles: str, **variables: str) -> dict[str, Any]:
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    command = [tool("docker-compose"), "-f", "docker/compose.yaml", *flags, "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_compose(profile: str) -> None:
    services = compose(profile)["services"]
    assert services
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        if "image" in service and "build" not in service:
            assert ":" in service["image"] and not service["image"].endswith(":latest"), name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", f"{name} is published to everybody"
        for mount in service.get("volumes", []):
            if mount["type"] == "bind" and mount["source"].startswith(str(ROOT)):
                assert Path(mount["source"]).exists(), mount["source"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_server(profile: str) -> None:
    (service,) = compose(profile)["services"].values()
    assert {port["target"] for port in service["ports"]} == {8000, 8001}  # metrics are for Prometheus alone
    assert (
        service["user"] == "1000:1000"
        and service["init"]
        and service["security_opt"] == ["no-new-privileges:true"]
    )
    assert int(service["shm_size"]) >= 1 << 30
    grace = int(re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", service["stop_grace_period"])[1] or 0) * 60
    assert grace >= ServeSettings().drain_s + 20
    assert service["environment"]["HF_TOKEN_PATH"] == "/run/secrets/hf_token"
    secret = {
        name: value for name, value in service["environment"].items() if re.search("TOKEN|PASSWORD|KEY", name)
    }
    assert secret.pop("ALLOW_NO_KEY") == "1"
    assert set(secret.values()) <= {"", "/run/secrets/hf_token"}, "a secret is in the environment"
    assert {each["source"] for each in service["secrets"]} == {"hf_token", "tls_cert", "tls_key", "api_keys"}
    assert {mount["target"] for mount in service["volumes"]} >= {
        "/engines",
        "/cache/huggingface",
        "/cache/home",
    }


def test_gpu_server() -> None:
    service = compose("gpu", GPUS="2")["services"]["gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 2, ["gpu"])
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}  # NVIDIA's own advice
    assert int(service["shm_size"]) >= 8 << 30


def test_all_at_once_and_settings_arrive() -> None:
    found = compose(*PROFILES, HTTP_PORT="18000", ENGINE="trtllm-engine", HF_TOKEN_FILE="/dev/null")
    gpu = found["services"]["gpu"]
    assert gpu["environment"]["ENGINE"] == "trtllm-engine"
    assert "18000" in {port["published"] for port in gpu["ports"]}
    assert {"locust", "locust-worker", "prometheus", "grafana", "dcgm-exporter"} < found["services"].keys()


def test_secrets_are_files(tmp_path: Path) -> None:
    found = compose("cpu", TLS_CERT="/c", TLS_KEY="/p", HF_TOKEN_FILE="/t", API_KEYS_FILE="/a")
    environment = found["services"]["cpu"]["environment"]
    assert (environment["TLS_CERT"], environment["TLS_KEY"]) == (
        "/run/secrets/tls_cert",
        "/run/secrets/tls_key",
    )
    files = {name: each["file"] for name, each in found["secrets"].items()}
    assert environment["API_KEYS_FILE"] == "/run/secrets/api_keys"
    assert files == {"hf_token": "/t", "tls_cert": "/c", "tls_key": "/p", "api_keys": "/a"}


def test_health_check_waits_for_a_long_load() -> None:
    for name in ("server", "cpu"):
        text = (DOCKER / f"{name}.Dockerfile").read_text(encoding="utf-8")
        start = int(re.search(r"--start-period=(\d+)m", text)[1])
        assert start * 60 >= 900


# -- scripts ---------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run_script(
    name: str, tmp_path: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    environment = {"PATH": path, "BUILD_DIR": str(tmp_path / "engines"), "HOME": str(tmp_path), **variables}
    return subprocess.run(
        [str(DOCKER / name), *arguments], capture_output=True, text=True, timeout=120, env=environment
    )


def test_entrypoint_builds_then_serves_without_the_token(tmp_path: Path) -> None:
    stand_in(
        tmp_path / "bin", "python3", 'echo "$2 token=${HF_TOKEN_PATH:-none} offline=${HF_HUB_OFFLINE:-0}"'
    )
    token = tmp_path / "token"
    token.write_text("secret")
    done = run_script("entrypoint.sh", tmp_path, HF_TOKEN_PATH=str(token))
    assert done.stdout.splitlines() == [
        f"flightline.engine_build token={token} offline=0",
        "flightline.supervisor.serve token=none offline=1",
    ]
    token.write_text("")
    assert "engine_build token=none" in run_script("entrypoint.sh", tmp_path, HF_TOKEN_PATH=str(token)).stdout


def test_entrypoint_does_not_serve_what_was_not_built(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "python3", 'echo "$2"; [ "$2" != flightline.engine_build ] || exit 1')
    done = run_script("entrypoint.sh", tmp_path)
    assert (done.returncode, done.stdout) == (1, "flightline.engine_build\n")
    assert run_script("entrypoint.sh", tmp_path, "echo", "hello").stdout == "hello\n"


def test_entrypoint_says_that_home_is_not_writable(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "python3", 'echo "$2"')
    (tmp_path / "file").touch()
    done = run_script("entrypoint.sh", tmp_path, HOME=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: HOME={tmp_path / 'file'} is not writable by user" in done.stderr
    assert "volume home:/cache/home" in done.stderr and len(done.stderr.splitlines()) == 1
    run_script("entrypoint.sh", tmp_path, HOME=str(tmp_path / "new"))
    assert (tmp_path / "new/.cache").is_dir()


def up(
    tmp_path: Path, *arguments: str, gpu: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    stand_in(tmp_path / "bin", "docker", '[ "$1" = info ] || echo "${IMAGE:-none} $@"')
    row = "NVIDIA H200, 9.0, 143771, 143000, 580.95.05"
    stand_in(tmp_path / "bin", "nvidia-smi", f'[ "$1" = -L ] || echo "{row}"' if gpu else "exit 9")
    stand_in(tmp_path / "bin", "python3", f'exec "{sys.executable}" "$@"')
    return run_script("up.sh", tmp_path, *arguments, **variables)


def test_up_chooses_the_profile(tmp_path: Path) -> None:
    tail = "up --build --detach --wait\n"
    assert up(tmp_path).stdout.endswith(f"--profile cpu {tail}")
    assert up(tmp_path, gpu=True).stdout.endswith(f"--profile gpu {tail}")
    more = up(tmp_path, gpu=True, PROFILES="loadtest observability")
    assert more.stdout.endswith(
        f"--profile gpu --profile loadtest --profile observability --profile dcgm {tail}"
    )
    assert "dcgm" not in up(tmp_path, PROFILES="observability").stdout
    assert up(tmp_path, "down").stdout.endswith("--profile * down\n")


def test_up_takes_the_container_for_the_driver(tmp_path: Path) -> None:
    assert up(tmp_path, gpu=True).stdout.startswith(
        "nvcr.io/nvidia/tritonserver:26.02-trtllm-python-py3 compose"
    )
    assert up(tmp_path, gpu=True, IMAGE="mine:1").stdout.startswith("mine:1 compose")
    assert up(tmp_path).stdout.startswith("none compose")


def test_up_says_what_is_missing(tmp_path: Path) -> None:
    refused = up(tmp_path, ENGINE="trtllm-engine")
    assert refused.returncode == 1 and "ENGINE=trtllm-engine needs an NVIDIA GPU" in refused.stderr
    stand_in(tmp_path / "bin", "docker", "exit 1")
    dead = run_script("up.sh", tmp_path)
    assert dead.returncode == 1 and "its daemon does not answer" in dead.stderr
    only = tmp_path / "only"
    only.mkdir()
    for name in ("dirname", "sh"):
        (only / name).symlink_to(shutil.which(name))
    none = subprocess.run([DOCKER / "up.sh"], capture_output=True, text=True, env={"PATH": str(only)})
    assert (
        none.returncode == 1
        and "docker is not installed: 'make serve' runs the server without it" in none.stderr
    )


def health(port: int) -> int:
    command = [sys.executable, "-S", str(DOCKER / "healthcheck.py")]
    environment = {"HTTP_PORT": str(port), "HEALTH_PATIENCE_S": "0.5"}
    return subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode


@pytest.mark.slow
def test_health_check_asks_for_a_real_answer(served: Server) -> None:
    assert health(served.settings.http_port) == 0
    assert health(1) == 1


@pytest.mark.parametrize(
    ("status", "healthy"),
    [
        (200, True),
        (503, False),
        (None, True),  # no answer in time, and the gateway itself is there
    ],
)
def test_health_check_of_a_busy_and_of_a_broken_server(status: int | None, healthy: bool) -> None:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ready" and status is None:
                over.wait(20)
                return
            self.send_response(status if self.path == "/ready" and status else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as url:
        assert (health(int(url.rpartition(":")[2])) == 0) == healthy
        over.set()


# -- metrics ---------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    groups = yaml.safe_load((DOCKER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return found + [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("expression", expressions())
def test_queries_parse(expression: str) -> None:
    promql_parser.parse(expression)


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:nv|DCGM_FI)_\w+", expression))


@pytest.mark.slow
def test_every_metric_of_a_query_is_exported(served: Server) -> None:
    """By the running server, or by the counters that the DCGM exporter is told to have."""
    ask(served, "ensemble")
    with urllib.request.urlopen(f"{served.settings.metrics_url}/metrics") as response:
        exported = set(re.findall(r"^(\w+)[{ ]", response.read().decode(), flags=re.M))
    exported |= set(re.findall(r"^(DCGM\w+),", (DOCKER / "dcgm-counters.csv").read_text(), flags=re.M))
    assert {name for each in expressions() for name in metric_names(each)} <= exported


def test_dashboard_and_scrape_targets() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {sources["datasources"][0]["uid"]}
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    hosts = {
        target.split(":")[0]
        for job in config["scrape_configs"]
        for each in job["static_configs"]
        for target in each["targets"]
    }
    services = compose(*PROFILES)["services"]
    assert hosts <= {"server", *services} and "server" in services["cpu"]["networks"]["default"]["aliases"]


def test_promtool_accepts_the_rules_and_they_fire() -> None:
    """From Debian's package, which ``make test`` brings; the grammar check above runs everywhere."""
    try:
        promtool = tool("promtool")
    except AssertionError:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    check(promtool, "check", "rules", DOCKER / "alerts.yml")
    check(promtool, "test", "rules", Path(__file__).parent / "alerts_test.yml")
    check(promtool, "check", "config", "--syntax-only", DOCKER / "prometheus.yml")


# -- Triton's own command line ---------------------------------------------------------------------------


def test_every_flag_exists(tmp_path: Path) -> None:
    """In the real server's help; TLS included."""
    home = triton.find()
    settings = ServeSettings(tls_cert=tmp_path / "c", tls_key=tmp_path / "k", triton_http_port=20_000)
    command = triton.command(home, settings, tmp_path, tmp_path, "prefix")
    done = subprocess.run(
        [str(home.binary), "--help"],
        capture_output=True,
        text=True,
        env=triton.environment(home, ["s"]),
        timeout=300,
    )
    known = set(re.findall(r"--[a-z-]+", done.stdout + done.stderr))
    flags = command[command.index(str(home.binary)) + 1 :]
    assert {part.split("=")[0] for part in [*flags, "--allow-http"]} <= known
    assert "--model-control-mode=none" in command and "--grpc-use-ssl=true" in command
    # They want a header that nobody can send: its name has a line end.
    closed = "model-repository,shared-memory,trace,logging:closed\n=-"
    assert {f"--grpc-restricted-protocol={closed}", f"--http-restricted-api={closed}"} <= set(command)
    # No way around the header: not served, and not opened by any client.
    assert not [part for part in command if "allow-client-shm=true" in part or "sagemaker" in part]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TLS_CERT": __file__}, "TLS_CERT and TLS_KEY belong together"),
        (
            {"TLS_CERT": "/nowhere", "TLS_KEY": __file__},
            "TLS_CERT='/nowhere' is not valid: there is no such file",
        ),
        ({"START_TIMEOUT_S": "soon"}, "START_TIMEOUT_S='soon' is not valid"),
        ({"TRITON_ADMIN_KEY_FILE": __file__}, "TRITON_ADMIN_KEY_FILE is not supported"),
        ({"FLIGHTLINE_HOST": "0.0.0.0"}, "asks for no key: set API_KEYS_FILE to a file"),
        ({"API_KEYS_FILE": "/nowhere"}, "API_KEYS_FILE='/nowhere' is not valid: there is no such file"),
        ({"GATEWAY_PROCESSES": "-1"}, "GATEWAY_PROCESSES='-1' is not valid"),
    ],
)
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ServeError, match=says):
        ServeSettings.from_environment()


# -- make verify-gpu-host --------------------------------------------------------------------------------


def verify(**variables: str) -> tuple[int, dict[str, str]]:
    """Exit code, and check to outcome; what it printed is shown if the test fails."""
    done = subprocess.run(
        [str(DOCKER / "verify.sh"), sys.executable],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **variables},
    )
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line[:4] in ("PASS", "FAIL", "SKIP")]
    return done.returncode, {line[6:30].strip(): line[:4] for line in lines}


def test_nothing_is_confirmed_where_there_is_no_gpu() -> None:
    code, outcomes = verify(HTTP_PORT="1", METRICS_PORT="1")
    assert code == 1 and set(outcomes.values()) == {"SKIP"} and len(outcomes) == 14


@pytest.mark.slow
def test_a_server_and_a_release_are_checked(served: Server) -> None:
    settings = served.settings
    code, outcomes = verify(
        HTTP_PORT=str(settings.http_port),
        METRICS_PORT=str(settings.metrics_port),
        PYTHONPATH=f"{ROOT / 'tests/trtllm_double'}:{ROOT}",
    )
    assert code == 0
    passed = {name for name, outcome in outcomes.items() if outcome == "PASS"}
    assert passed == {"release", "LLM API surface", "answers", "streaming", "metrics"}
