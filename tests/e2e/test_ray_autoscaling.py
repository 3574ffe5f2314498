"""The policy of the shipped file, as Ray restores it, without a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import ServeDeploySchema

from deploy.ray_autoscaling import UtilizationPolicy

FILE = Path(__file__).parents[2] / "deploy" / "ray_serve.yaml"

Policy = Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]


def shipped() -> AutoscalingConfig:
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text())).applications
    (deployment,) = application.deployments
    return AutoscalingConfig.model_validate(deployment.autoscaling_config)


def context(utilization: list[float], requests: float) -> AutoscalingContext:
    names = ("deployment_id", "deployment_name", "app_name", "raw_metrics", "last_scale_up_time")
    unused = dict.fromkeys((*names, "last_scale_down_time", "current_time"))
    replicas = {str(replica): each for replica, each in enumerate(utilization)}
    return AutoscalingContext(
        **unused,
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas),
        running_replicas=list(replicas),
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={"utilization": replicas} if replicas else {},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        config=shipped(),
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    restored = shipped().policy.get_policy()
    assert restored.__name__ == UtilizationPolicy.__name__
    made: Policy = restored(**shipped().policy.policy_kwargs)
    return made


@pytest.mark.parametrize(
    ("utilization", "requests", "replicas"),
    [
        ([0.7, 0.7], 20, 2.0),
        ([1.0, 0.75], 40, 2.5),
        ([0.1, 0.25], 5, 0.5),
        ([0.7, 0.7], 256, 4.0),
        ([], 64, 1.0),
    ],
    ids=["at the target", "above it", "below it", "requests that wait", "before the first report"],
)
def test_replicas_follow_utilization_and_requests(
    policy: Policy, utilization: list[float], requests: float, replicas: float
) -> None:
    desired, state = policy(context(utilization, requests))
    assert desired == pytest.approx(replicas)
    assert state == {}
