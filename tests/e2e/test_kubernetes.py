"""Manifests as kubectl renders them: valid by Kubernetes' schemas and consistent with the service."""

import os
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

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = "1.37"
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"

Manifest = dict[str, Any]


@cache
def render(folder: Path) -> dict[str, Manifest]:
    """The manifests of a kustomization by their kind."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """The GPU overlay with both components."""
    folder = tmp_path_factory.mktemp("everything")
    place = os.path.relpath(KUBERNETES.resolve(), folder.resolve())
    components = [f"{place}/components/{name}" for name in ("monitoring", "queue-scaling")]
    content = {"resources": [f"{place}/overlays/gpu"], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(folder)


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
