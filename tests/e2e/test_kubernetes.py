"""Manifests as kubectl renders them: valid by Kubernetes' schemas and consistent with the service."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app import __version__
from app.api.routes import router
from app.settings import PREFIX, Settings
from app.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPONENTS = KUBERNETES / "components"
SCHEMAS = "1.37"
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"

Manifest = dict[str, Any]


@cache
def render(folder: Path) -> dict[str, Manifest]:
    """The manifests of a kustomization by their kind."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


def gpu_overlay(folder: Path, *names: str) -> dict[str, Manifest]:
    """With these components."""
    place = os.path.relpath(KUBERNETES.resolve(), folder.resolve())
    components = [f"{place}/components/{name}" for name in names]
    content = {"resources": [f"{place}/overlays/gpu"], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(folder)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """The GPU overlay with monitoring and scaling by queue size."""
    return gpu_overlay(tmp_path_factory.mktemp("everything"), "monitoring", "queue-scaling")


@pytest.fixture(scope="module", params=["base", "overlays/gpu", "all"])
def manifests(request: pytest.FixtureRequest, everything: dict[str, Manifest]) -> dict[str, Manifest]:
    return everything if request.param == "all" else render(KUBERNETES / request.param)


@pytest.fixture(scope="module")
def inference_service() -> Manifest:
    manifest: Manifest = yaml.safe_load((ROOT / "deploy" / "kserve" / "inferenceservice.yaml").read_text())
    return manifest


def pod(manifests: dict[str, Manifest]) -> Manifest:
    spec: Manifest = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_manifests_are_valid(manifests: dict[str, Manifest]) -> None:
    for kind, manifest in manifests.items():
        if kind != "ServiceMonitor":  # Kubernetes has no schema of it
            kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
    assert len(manifests) >= 5


def test_selectors_match_the_pods(manifests: dict[str, Manifest]) -> None:
    deployment = manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "the autoscaler sets them"
    ports = {port["name"] for port in pod(manifests)["containers"][0]["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == ports
    assert {port["port"] for port in manifests["NetworkPolicy"]["spec"]["ingress"][0]["ports"]} == ports


def test_service_monitor_matches_the_service(everything: dict[str, Manifest]) -> None:
    monitor, service = everything["ServiceMonitor"], everything["Service"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_queue_scaling_replaces_the_cpu_metric(everything: dict[str, Manifest]) -> None:
    assert [metric["type"] for metric in everything["HorizontalPodAutoscaler"]["spec"]["metrics"]] == ["Pods"]


def adapter_rules() -> list[dict[str, Any]]:
    values = yaml.safe_load((COMPONENTS / "utilization-scaling" / "adapter.yaml").read_text())
    rules: list[dict[str, Any]] = values["rules"]["custom"]
    return rules


def adapter_query(rule: dict[str, Any]) -> str:
    """The rule's PromQL for the pods of the default namespace."""
    series = rule["seriesQuery"].partition("{")[0]
    parts = {"<<.GroupBy>>": "pod", "<<.Series>>": series, "<<.LabelMatchers>>": 'namespace="default", pod=~"a|b"'}
    query: str = rule["metricsQuery"]
    for name, value in parts.items():
        query = query.replace(name, value)
    return query


def triggers() -> list[dict[str, str]]:
    manifest = yaml.safe_load((COMPONENTS / "keda-scaling" / "scaledobject.yaml").read_text())
    return [trigger["metadata"] for trigger in manifest["spec"]["triggers"]]


def test_utilization_scaling_has_a_rule_for_each_metric(tmp_path: Path) -> None:
    manifests = gpu_overlay(tmp_path, "monitoring", "utilization-scaling")
    kubernetes_validate.validate(manifests["HorizontalPodAutoscaler"], SCHEMAS, strict=True)
    metrics = [metric["pods"] for metric in manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]]
    targets = {metric["metric"]["name"]: metric["target"]["averageValue"] for metric in metrics}
    assert targets == {"thirtytwo_utilization_ratio": "700m", "thirtytwo_queue_size": "64"}
    assert [rule["name"]["as"] for rule in adapter_rules()] == list(targets)
    assert all(rule["seriesQuery"].startswith(rule["name"]["as"] + "{") for rule in adapter_rules())
    assert all(set(rule["resources"]["overrides"]) == {"namespace", "pod"} for rule in adapter_rules())


def test_keda_replaces_the_autoscaler(tmp_path: Path) -> None:
    manifests = gpu_overlay(tmp_path, "monitoring", "keda-scaling")
    assert "HorizontalPodAutoscaler" not in manifests
    spec = manifests["ScaledObject"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert 0 < spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert [trigger["type"] for trigger in spec["triggers"]] == ["prometheus"] * len(triggers())


def test_scaling_queries_use_exported_metrics() -> None:
    queries = [adapter_query(rule) for rule in adapter_rules()] + [trigger["query"] for trigger in triggers()]
    names = {family.name for family in Metrics().registry.collect()}
    assert {name for query in queries for name in re.findall(r"thirtytwo_\w+", query)} <= names


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian's prometheus package) is not installed")
def test_scaling_queries_return_the_load(tmp_path: Path) -> None:
    """Two pods: one is limited by its engine, the other by its event loop."""
    labels = 'job="thirtytwo", namespace="default"'
    series = {
        f'thirtytwo_utilization_ratio{{{labels}, pod="a", resource="engine"}}': 0.9,
        f'thirtytwo_utilization_ratio{{{labels}, pod="a", resource="event_loop"}}': 0.2,
        f'thirtytwo_utilization_ratio{{{labels}, pod="b", resource="engine"}}': 0.1,
        f'thirtytwo_utilization_ratio{{{labels}, pod="b", resource="event_loop"}}': 0.75,
        f'thirtytwo_queue_size{{{labels}, pod="a"}}': 30,
        f'thirtytwo_queue_size{{{labels}, pod="b"}}': 50,
    }
    expected: dict[str, list[dict[str, Any]]] = {
        adapter_query(adapter_rules()[0]): [sample(0.9, pod="a"), sample(0.75, pod="b")],
        adapter_query(adapter_rules()[1]): [sample(30, pod="a"), sample(50, pod="b")],
        triggers()[0]["query"]: [sample(1.65)],  # three replicas at 0.7
        triggers()[1]["query"]: [sample(80)],
    }
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": f"{value}x4"} for name, value in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": "1m", "exp_samples": samples} for query, samples in expected.items()
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def sample(value: float, **labels: str) -> dict[str, Any]:
    pairs = ", ".join(f'{name}="{text}"' for name, text in labels.items())
    return {"labels": f"{{{pairs}}}", "value": value}


def test_gpu_overlay_requires_a_gpu(everything: dict[str, Manifest]) -> None:
    (container,) = pod(everything)["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "THIRTYTWO_DEVICE", "value": "cuda"} in container["env"]
    assert {"name": "THIRTYTWO_LOG_FORMAT", "value": "json"} in container["env"]


def test_grace_period_exceeds_the_shutdown_timeout(manifests: dict[str, Manifest]) -> None:
    (container,) = pod(manifests)["containers"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(manifests)["terminationGracePeriodSeconds"] > pause + Settings().shutdown_timeout_s


def test_inference_service_is_valid(inference_service: Manifest) -> None:
    assert inference_service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert inference_service["kind"] == "InferenceService"
    predictor = dict(inference_service["spec"]["predictor"])
    assert 0 < predictor.pop("minReplicas") <= predictor.pop("maxReplicas")
    specification = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": predictor}
    kubernetes_validate.validate(specification, SCHEMAS, strict=True)
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]


def test_pods_are_locked_down_and_use_existing_settings(
    manifests: dict[str, Manifest], inference_service: Manifest
) -> None:
    for spec in (pod(manifests), inference_service["spec"]["predictor"]):
        (container,) = spec["containers"]
        security = {**spec.get("securityContext", {}), **container["securityContext"]}
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        device = "" if "nvidia.com/gpu" in container["resources"]["limits"] else "-cpu"
        assert container["image"] == f"thirtytwo:{__version__}{device}"
        names = {entry["name"] for entry in container["env"]} - {"PROTOCOL"}
        assert names <= {PREFIX + name.upper() for name in Settings.model_fields}
        probes = [probe["httpGet"] for key, probe in container.items() if key.endswith("Probe")]
        assert {probe["path"] for probe in probes} <= {getattr(route, "path", "") for route in router.routes}
        assert {probe["port"] for probe in probes} <= {"http", 8000}
        assert container["ports"][0]["containerPort"] == 8000
