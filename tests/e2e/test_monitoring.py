"""Alert rules and dashboard query only exported metrics; promtool, where it is installed, runs the rules' own tests."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import Metric

from app.telemetry.metrics import Metrics
from tests.support.monitoring import DEPLOY, GRAFANA, PROMETHEUS, dashboard, panels, queries, rules, without_variables

PROMETHEUS_LABELS = {"job", "instance", "le"}
NAME = re.compile(r"thirtytwo_\w+")
EXPRESSIONS = [*queries(), *(rule["expr"] for rule in rules())]


def exported() -> Iterator[Metric]:
    """Our metrics, each with at least one sample."""
    metrics = Metrics()
    metrics.describe_model(["cat"], stages=2)
    metrics.name_model("cifar10", "00000000", "torch", "cuda:0", "bfloat16", exit_shares=[0.75, 0.25])
    metrics.observe_request("/predict", 200, 0.1)
    metrics.observe_memory("cuda:0", 1, 2)
    metrics.rejections.labels("too-large")
    metrics.observe_key("shop", 1, accepted=True)
    metrics.observe_engine(1000.0, 0.5)
    metrics.observe_shadow([("cat", True)], 0.1)
    metrics.observe_drift("confidence", 0.1, 0.02)
    return (metric for metric in metrics.registry.collect() if metric.name.startswith("thirtytwo_"))


def test_queries_use_exported_metrics_only() -> None:
    names = {sample.name for metric in exported() for sample in metric.samples if not sample.name.endswith("_created")}
    assert set(NAME.findall(" ".join(EXPRESSIONS))) <= names
    assert set(NAME.findall((PROMETHEUS / "alerts_test.yml").read_text())) <= names


def test_dashboard_shows_every_metric() -> None:
    shown = " ".join(queries())
    assert [metric.name for metric in exported() if metric.name not in shown] == []


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queries_use_exported_labels_only(expression: str) -> None:
    grouped = re.findall(r"\b(?:by|on|ignoring) \(([\w, ]*)\)", expression)
    matched = re.findall(r"[{,]\s*(\w+)\s*[=!]", expression)
    named = {name for group in grouped for name in group.split(", ") if name} | set(matched)
    assert named <= {label for metric in exported() for label in metric.samples[0].labels} | PROMETHEUS_LABELS


def test_panels_are_complete_and_do_not_overlap() -> None:
    identifiers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels())
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard()["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_provisioning_matches_the_mounts() -> None:
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "thirtytwo.yml").read_text())["providers"][0]
    source = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian's prometheus package) is not installed")
def test_promtool_accepts_rules_and_queries(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{number}", "expr": without_variables(query)} for number, query in enumerate(queries())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    for command in (
        ["check", "config", PROMETHEUS / "prometheus.yml"],
        ["test", "rules", PROMETHEUS / "alerts_test.yml"],
        ["check", "rules", tmp_path / "panels.yml"],
    ):
        done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_that_fires_it() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


def test_queue_alert_is_relative_to_the_limit() -> None:
    """Any THIRTYTWO_MAX_QUEUE raises it at the same share."""
    (rule,) = (rule for rule in rules() if rule["alert"] == "ThirtytwoQueueNearlyFull")
    assert re.fullmatch(r"thirtytwo_queue_size\{.*\} / thirtytwo_queue_limit\{.*\} > 0\.\d+", rule["expr"])
