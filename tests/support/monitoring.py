"""The shipped alert rules, dashboard and Prometheus configuration, parsed once; the metrics of a service."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"


@cache
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "thirtytwo.json").read_text())
    return content


@cache
def rules() -> list[dict[str, Any]]:
    """Every alert rule, in file order."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@cache
def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


@cache
def queries() -> list[str]:
    """The PromQL of every panel, with Grafana's variables."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def without_variables(query: str, interval: str = "5m") -> str:
    """A panel's query as Prometheus accepts it, over all instances."""
    return query.replace("$__rate_interval", interval).replace("$instance", ".*")


def read_metric(client: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    """A metric's values by those of its labels, in the order of the labels' names."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == name
    }
