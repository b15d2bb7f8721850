"""The chart's objects: valid for Kubernetes, safe, and in agreement with each other and with the server's own times."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml

from flightline import settings as loader
from flightline.engine_build.settings import Settings as BuildSettings
from flightline.gateway.settings import GatewaySettings
from flightline.supervisor import gateway as gateway_processes
from flightline.supervisor import triton
from flightline.supervisor.settings import ServeSettings
from tests.deploy.chart import CHART, VALUES, environment, helm, kubectl, one, pods, rendered, server
from tests.docker.test_images import tool

EVERY = pytest.mark.parametrize("name", VALUES)
KUBERNETES = ("1.32", "1.36")
OF_OPERATORS = {
    *("PodMonitor", "PrometheusRule", "ScaledObject", "InferencePool", "LeaderWorkerSet"),
}
"""Kinds whose schemas come with an operator."""
METRICS = {
    *(
        "flightline_engine_requests_in_flight",
        "flightline_engine_requests_waiting",
        "flightline_engine_kv_use",
    ),
    *("flightline_engine_requests_finished_total", "flightline_gateway_requests_total"),
}
"""Those that tests/gateway/test_engine_metrics.py finds on a real page."""


def test_there_are_twelve_sets() -> None:
    assert len(VALUES) >= 12


@EVERY
def test_lint(name: str) -> None:
    done = helm("lint", "--strict", CHART, "-f", VALUES[name])
    assert done.returncode == 0, done.stdout + done.stderr


@EVERY
def test_kubernetes_takes_it(name: str) -> None:
    unknown = set()
    for each in rendered(name):
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(each, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                unknown.add(each["kind"])
    assert unknown <= OF_OPERATORS
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered(name)]
    assert len(names) == len(set(names))


@EVERY
def test_kubectl_reads_it(name: str, tmp_path: Path) -> None:
    """Decoded as for a cluster, but without one."""
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(rendered(name)))
    done = kubectl("label", "--local", "-f", file, "checked=yes", "-o", "name")
    assert done.returncode == 0, done.stderr
    read = [line.split("/") for line in done.stdout.splitlines()]
    assert [(kind.split(".")[0], name) for kind, name in read] == [
        (each["kind"].lower(), each["metadata"]["name"]) for each in rendered(name)
    ]


@EVERY
def test_pods_are_nobody_special(name: str) -> None:
    for owner, pod in pods(rendered(name)).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, owner
        assert spec["securityContext"]["runAsNonRoot"], owner
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), owner
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], owner
            assert security["capabilities"] == {"drop": ["ALL"]} and security["runAsUser"] == 1000, owner
            assert {"requests", "limits"} <= container["resources"].keys(), owner
            volumes = {each["name"] for each in spec["volumes"]}
            assert {each["name"] for each in container["volumeMounts"]} <= volumes, owner
            writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
            assert "/tmp" in writable and "/cache/home" in writable, owner
            secrets = [each for each in container.get("env", ()) if re.search("TOKEN|KEY", each["name"])]
            for each in secrets:
                said = each.get("value", "/run/")  # else it is in a Secret
                assert said in ("0", "1") or said.startswith("/run/"), each


@EVERY
def test_selectors_find_the_pods(name: str) -> None:
    objects = rendered(name)
    labels = server(objects)["metadata"]["labels"]
    extra = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    for each in objects:
        selector = each.get("spec", {}).get("selector") or each.get("spec", {}).get("podSelector")
        if selector is None or each["kind"] == "Deployment" or each["metadata"]["name"].endswith("-build"):
            continue
        wanted = selector.get("matchLabels", selector)
        assert wanted.items() <= (labels | extra).items(), each["kind"]
    for each in objects:
        if each["kind"] == "PodDisruptionBudget":
            assert each["spec"]["maxUnavailable"] == 1


@EVERY
def test_every_setting_is_one_of_the_server(name: str) -> None:
    known = {
        variable
        for cls in (BuildSettings, ServeSettings, GatewaySettings)
        for field in loader.fields(cls)
        for variable in loader.variables(field)
    } | {"LOG_FORMAT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"}
    for pod in pods(rendered(name)).values():
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            ours = {
                variable
                for variable in environment(container)
                if variable.startswith(("FLIGHTLINE_", "LOG_", "HF_"))
            }
            assert ours <= known, ours - known


@EVERY
def test_probes_and_times(name: str) -> None:
    objects = rendered(name)
    pod = server(objects)["spec"]
    (container,) = pod["containers"]
    env = environment(container)
    start = container["startupProbe"]
    patience = start["periodSeconds"] * start["failureThreshold"]
    assert patience >= float(env["FLIGHTLINE_START_TIMEOUT_S"]) >= 3600
    assert start["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    alive = container["livenessProbe"]
    assert alive["httpGet"]["path"] == "/health"
    # The supervisor gets its chance first: it restarts a silent process after this.
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 2 * ServeSettings().probe_timeout_s
    engines = int(environment(builder(objects)).get("FLIGHTLINE_DP", "1"))
    longest = (
        container["lifecycle"]["preStop"]["sleep"]["seconds"]
        + float(env["FLIGHTLINE_DRAIN_S"])
        + 5 * engines
        + triton.EXIT_S
        + gateway_processes.EXIT_S * int(env["FLIGHTLINE_GATEWAY_PROCESSES"])
    )
    assert pod["terminationGracePeriodSeconds"] >= longest + 5
    ready = container["readinessProbe"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] >= ready["periodSeconds"]


def builder(objects: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The container that builds."""
    (found,) = [
        container
        for pod in pods(objects).values()
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ()))
        if container["name"] == "build"
    ]
    return found


@EVERY
def test_the_engine_is_served_from_where_it_was_built(name: str) -> None:
    objects = rendered(name)

    def mount(container: dict[str, Any], path: str) -> dict[str, Any]:
        (found,) = [each for each in container["volumeMounts"] if each["mountPath"] == path]
        return found

    (serves,) = server(objects)["spec"]["containers"]
    made, read = mount(builder(objects), "/engines"), mount(serves, "/engines")
    assert read["readOnly"] and not made.get("readOnly")
    assert made.get("subPath") == read.get("subPath")
    assert not mount(serves, "/engines/run").get("readOnly")
    assert mount(serves, "/cache/huggingface")["readOnly"]
    paths = {each["mountPath"] for each in serves["volumeMounts"]}
    assert "/run/secrets/hub" not in paths and "HF_TOKEN_PATH" not in environment(serves)
    gpus = [container["resources"]["limits"] for container in (serves, builder(objects))]
    assert gpus[0] == gpus[1]


def test_an_engine_has_the_key_of_its_gpu_and_content() -> None:
    def key(*more: str) -> str:
        return server(rendered("compiled", *more))["metadata"]["annotations"]["flightline/engine"]

    assert key().startswith("nvidia-h100-80gb-hbm3-")
    assert key("replicas=9", "server.drainSeconds=99") == key()
    others = ("engine.precision=bf16", "engine.tp=1", "model=/models/other", "image.tag=v2", "gpu.product=L4")
    assert len({key(), *map(key, others), key("engine.generation=2")}) == len(others) + 2


def test_the_build_runs_before_the_servers_and_keeps_their_volumes() -> None:
    objects = rendered("compiled")
    job = one(objects, "Job")["metadata"]["annotations"]
    assert job["helm.sh/hook"] == "pre-install,pre-upgrade"
    for claim in ("engines", "hub"):
        notes = one(objects, "PersistentVolumeClaim", claim)["metadata"]["annotations"]
        assert int(notes["helm.sh/hook-weight"]) < int(job["helm.sh/hook-weight"])
        assert notes["helm.sh/hook-delete-policy"] == "hook-failed", "it would be deleted and made anew"
    assert one(objects, "Deployment")["spec"]["replicas"] == 4


def test_gpus_of_a_pod() -> None:
    def gpus(name: str, *more: str) -> Any:
        (container,) = server(rendered(name, *more))["spec"]["containers"]
        return container["resources"]["limits"].get("nvidia.com/gpu")

    assert (gpus("llama-70b"), gpus("eight-engines"), gpus("several-nodes")) == (2, 8, 8)
    assert gpus("cpu-trial") is None
    assert gpus("compiled", "engine.pp=2") == 4


def test_70b_as_the_guide_has_it() -> None:
    objects = rendered("llama-70b")
    scaled = one(objects, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (3, 8)
    assert "replicas" not in one(objects, "Deployment")["spec"], "it would undo what the autoscaler does"
    assert scaled["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    assert environment(builder(objects))["FLIGHTLINE_TP"] == "2"


def test_one_engine_over_several_nodes() -> None:
    objects = rendered("several-nodes")
    group = one(objects, "LeaderWorkerSet")
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 2
    (leader,) = server(objects)["spec"]["containers"]
    hosts = environment(leader)["FLIGHTLINE_MPI_HOSTS"]
    name = group["metadata"]["name"]
    assert hosts == f"$(GROUP).{name}:8,$(GROUP)-1.{name}:8"
    assert one(objects, "Service")["metadata"]["name"] != name, "the controller makes a Service of that name"
    policy = next(each["spec"] for each in objects if each["kind"] == "NetworkPolicy")
    assert any("ports" not in rule for rule in policy["ingress"]), "ranks talk on any port"


@EVERY
def test_queries_are_promql_about_metrics_that_there_are(name: str) -> None:
    queries = []
    for each in rendered(name):
        if each["kind"] == "ScaledObject":
            queries += [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
        elif each["kind"] == "PrometheusRule":
            queries += [rule["expr"] for group in each["spec"]["groups"] for rule in group["rules"]]
        elif each["kind"] == "HorizontalPodAutoscaler":
            queries += [metric["pods"]["metric"]["name"] for metric in each["spec"]["metrics"]]
    for query in queries:
        promql_parser.parse(query)
        assert set(re.findall(r"flightline_\w+", query)) <= METRICS, query
        if pod := re.search(r'pod=~"([^"]+)"', query):
            ours = "demo-nodes-0" if name == "several-nodes" else "demo-6d5f7b8c9d-x2x7k"
            assert re.fullmatch(pod[1], ours) and not re.fullmatch(pod[1], "demo-two-6d5f7b8c9d-x2x7k")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("one-gpu", "auth.apiKeysSecret=", "anybody could use the server"),
        ("one-gpu", "gpu.product=", "kubectl get nodes -L nvidia.com/gpu.product"),
        ("one-gpu", "image.tag=", "image.tag and image.digest are empty"),
        ("one-gpu", "image.tag=latest", "image.tag=latest is another image tomorrow"),
        ("one-gpu", "engine.backends=torch", "backends"),
        ("one-gpu", "engine.nodes=2", "needs engine.backend=trtllm-engine"),
        ("compiled", "engine.dp=2", "with trtllm-engine take more replicas"),
        ("compiled", "storage.engines.accessMode=ReadWriteOnce", "cannot be shared by several replicas"),
        ("several-nodes", "engine.nodes=3", "cannot be spread evenly"),
        ("llama-70b", "autoscaling.inFlightPerReplica=null", "flightline loadtest search"),
        ("llama-70b", "autoscaling.maxReplicas=2", "minReplicas is above maxReplicas"),
        ("loadtest", "server.baseline=false", "the load test compares with hf_baseline"),
        ("inference-pool", "inferencePool.endpointPicker=", "name the Service"),
        ("one-gpu", "strategy.maxSurge=0", "no update could begin"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name: str, change: str, says: str) -> None:
    done = helm("template", "demo", CHART, "-f", VALUES[name], "--set", change)
    assert done.returncode != 0 and says in done.stderr, done.stdout[-500:] + done.stderr


def test_closed_network() -> None:
    (server_rules, build_rules) = [
        each["spec"] for each in rendered("one-gpu") if each["kind"] == "NetworkPolicy"
    ]
    assert server_rules["egress"] == [] and server_rules["policyTypes"] == ["Ingress", "Egress"]
    ports = [{port["port"] for port in rule["ports"]} for rule in server_rules["ingress"]]
    assert ports == [{"http"}, {"http", "metrics"}], "gRPC asks for no key"
    assert {port["port"] for rule in build_rules["egress"] for port in rule["ports"]} == {53, 443}


def test_load_test_job() -> None:
    job = one(rendered("loadtest"), "Job", "loadtest")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "test"
    from flightline.loadtest.options import CompareOptions

    flags = {loader.flag(field) for field in loader.fields(CompareOptions)}
    given = {argument.partition("=")[0] for argument in container["args"]}
    assert given <= flags and container["command"][-1] == "compare"
    assert {"name": "reports", "mountPath": "/reports"} in container["volumeMounts"]


def test_defaults_are_the_schemas(tmp_path: Path) -> None:
    """Every value of values.yaml has a place in the schema, and the schema names none that is not there."""
    import json

    def keys(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        named = set(schema.get("properties", {})) - {"global"}
        if not named:
            return
        assert named == set(values), path
        for key, value in values.items():
            if isinstance(value, dict):
                keys(schema["properties"][key], value, f"{path}.{key}")

    schema = json.loads((CHART / "values.schema.json").read_text())
    keys(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


def test_what_scales_fires_when_requests_wait_and_not_before(tmp_path: Path) -> None:
    """The chart's own queries in Prometheus' own test: two busy replicas with 200 waiting, then the same with none.

    The rule of NVIDIA's samples stands beside them: queue time over compute time, as Triton counts them.
    """
    try:
        promtool = tool("promtool")
    except AssertionError:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    objects = rendered("llama-70b")
    triggers = {each["name"]: each["metadata"] for each in one(objects, "ScaledObject")["spec"]["triggers"]}
    rules = [
        {"record": f"{name}:fires", "expr": f"({each['query']}) / {scale} > bool {each['threshold']}"}
        for name, each in triggers.items()
        for scale in [2 if name == "in-flight" else 1]  # AverageValue: by the replicas
    ]
    rules = [{**rule, "record": rule["record"].replace("-", "_")} for rule in rules]
    queue, work = (f"rate(nv_inference_{part}_duration_us[1m])" for part in ("queue", "compute_infer"))
    sampled = f"{queue} / clamp_min({work}, 1)"
    rules.append({"record": "sampled:fires", "expr": f"{sampled} > bool 1"})
    alerts = one(objects, "PrometheusRule")["spec"]["groups"]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [*alerts, {"name": "scale", "rules": rules}]})
    )

    def series(name: str, values: str, labels: str = "") -> list[dict[str, str]]:
        pods = ("demo-6d5f7b8c9d-x2x7k", "demo-6d5f7b8c9d-zzzzz", "other-6d5f7b8c9d-x2x7k")
        return [
            {"series": f'{name}{{namespace="llm",pod="{pod}"{labels}}}', "values": values} for pod in pods[:2]
        ] + [{"series": f'{name}{{namespace="llm",pod="{pods[2]}"}}', "values": "9999x60"}]

    made = [
        *series("flightline_engine_requests_waiting", "100x19 0x40"),
        *series("flightline_engine_requests_in_flight", "164x19 32x40"),
        *series("flightline_engine_requests_finished_total", "0+75x59"),  # 5 a second each
        *series("flightline_engine_kv_use", "0.95x19 0.4x40"),
        {"series": 'nv_inference_queue_duration_us{pod="a"}', "values": "0+1293x59"},
        {"series": 'nv_inference_compute_infer_duration_us{pod="a"}', "values": "0+369358274x59"},
    ]
    expected = {"in_flight:fires": (1, 0), "queue_wait:fires": (1, 0), "kv_use:fires": (1, 0)}
    expected["sampled:fires"] = (0, 0)
    tests = [
        {"expr": f"sum({record})", "eval_time": when, "exp_samples": [{"labels": "{}", "value": value}]}
        for record, values in expected.items()
        for when, value in zip(("4m", "10m"), values, strict=True)
    ]
    late_alert = {"exp_labels": {"severity": "warn"}, "exp_annotations": alerts[0]["rules"][1]["annotations"]}
    fires = [
        {"eval_time": "4m", "alertname": "FlightlineQueue", "exp_alerts": []},
        {"eval_time": "14m", "alertname": "FlightlineSilent", "exp_alerts": []},
    ]
    longer = [{**each, "values": each["values"].replace("x19 ", "x40 ")} for each in made]
    late = [{"eval_time": "7m", "alertname": "FlightlineQueue", "exp_alerts": [late_alert]}]
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "15s",
        "tests": [
            {"interval": "15s", "input_series": made, "promql_expr_test": tests, "alert_rule_test": fires},
            {"interval": "15s", "input_series": longer, "alert_rule_test": late},
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guides_values_are_those_that_are_tried() -> None:
    guide = (CHART.parents[2] / "docs/SCALE.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^`70b\.yaml`.*?```yaml\n(.*?)```", guide, re.S | re.M)
    assert yaml.safe_load(block) == yaml.safe_load(VALUES["llama-70b"].read_text(encoding="utf-8"))
    known = {field.removeprefix("engine.") for field in re.findall(r"`(engine\.\w+)`", guide)}
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert known <= values["engine"].keys()
