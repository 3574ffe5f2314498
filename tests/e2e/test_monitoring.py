"""Alert rules and dashboard name only what the service exports; promtool, where it is installed, runs them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from app.settings import Settings
from app.telemetry.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
LABELS_OF_PROMETHEUS = {"job", "instance", "le"}

metrics = [metric for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)]
dashboard: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "thirtytwo.json").read_text())
rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
queries = [target["expr"] for panel in panels for target in panel["targets"]]
expressions = queries + [rule["expr"] for rule in rules]


def test_every_metric_that_is_asked_for_exists_and_none_is_forgotten() -> None:
    exported = {metric._name + suffix for metric in metrics for suffix in SUFFIXES[metric._type]}
    assert set(re.findall(r"thirtytwo_\w+", " ".join(expressions))) <= exported
    assert set(re.findall(r"thirtytwo_\w+", (PROMETHEUS / "alerts_test.yml").read_text())) <= exported
    shown = " ".join(queries)
    assert [metric._name for metric in metrics if metric._name not in shown] == []


@pytest.mark.parametrize("expression", expressions)
def test_every_label_that_is_asked_for_exists(expression: str) -> None:
    grouped = re.findall(r"\b(?:by|on|ignoring) \(([\w, ]*)\)", expression)
    matched = re.findall(r"[{,]\s*(\w+)\s*[=!]", expression)
    named = {name for group in grouped for name in group.split(", ") if name} | set(matched)
    assert named <= {label for metric in metrics for label in metric._labelnames} | LABELS_OF_PROMETHEUS


def test_the_dashboard_is_whole() -> None:
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) == 23


def test_the_provisioning_fits_the_mounts() -> None:
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "thirtytwo.yml").read_text())["providers"][0]
    source = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian's prometheus package) is not installed")
def test_promtool_accepts_the_rules_and_they_fire_as_they_should(tmp_path: Path) -> None:
    plain = [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in queries]
    recorded = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(plain)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    for command in (
        ["check", "config", PROMETHEUS / "prometheus.yml"],
        ["test", "rules", PROMETHEUS / "alerts_test.yml"],
        ["check", "rules", tmp_path / "panels.yml"],
    ):
        done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_queue_s_alert_knows_the_default_limit() -> None:
    (rule,) = (rule for rule in rules if rule["alert"] == "ThirtytwoQueueNearlyFull")
    assert rule["expr"].endswith(f" > {int(0.8 * Settings().max_queue)}")


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules}
