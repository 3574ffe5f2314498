"""The number of replicas on Ray, by utilization and by requests in progress.

Ray sends this class to its controller by value, so it uses no other module.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class UtilizationPolicy:
    """Replicas at `target_utilization` on average, or more if `target_ongoing_requests` of the deployment needs them.

    The utilization is proportional to the load but never above 1 and late after a jump of the load. The requests in
    progress follow at once, but grow only when the replicas are nearly full.
    """

    def __init__(self, target_utilization: float = 0.7) -> None:
        self._target_utilization = target_utilization

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get("utilization", {})  # of Replica.record_autoscaling_stats
        by_utilization = sum(reported.values()) / self._target_utilization
        by_requests = context.total_num_requests / context.config.target_ongoing_requests
        return max(by_utilization, by_requests), {}
