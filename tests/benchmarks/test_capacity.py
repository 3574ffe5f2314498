"""The plan for a rate, and the tables of a short run."""

import pytest

from benchmarks import capacity
from benchmarks.capacity import Plan


def values(plan: Plan) -> list[str]:
    return [value for _, value in plan.rows()]


def test_plan_follows_its_formulas() -> None:
    plan = Plan(1e6, 64, 1000, 0.5, cores=2, price=0.1, request_bytes=10_000, response_bytes=2_500, latency_s=0.1)
    assert values(plan) == ["15,625", "2,000", "4,000", "400.00", "0.111", "1.25", "0.31", "0.8", "1,562"]


def test_service_has_the_measured_rates() -> None:
    arguments = capacity.parser().parse_args(["--one-image-per-s", "400", "--images-per-s", "1000"])
    replica = capacity.service(arguments)
    assert replica.images_per_s(1) == pytest.approx(1000)
    assert 1 / replica.batch_s(1) == pytest.approx(400)


def test_slow_event_loop_limits_the_rate() -> None:
    arguments = capacity.parser().parse_args(["--images-per-s", "150000", "--request-us", "25", "--decode-us", "75"])
    assert capacity.service(arguments).images_per_s(1) == pytest.approx(10_000)


def test_rates_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SystemExit, match="lower than --one-image-per-s"):
        capacity.main(["--images-per-s", "100"])


def test_tables_and_plan_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    capacity.main(["--images", "1000", "--plan-only"])
    assert "| requests/s = total / images | 1,000 |" in capsys.readouterr().out
    replica = capacity.service(capacity.parser().parse_args([]))
    (head, *rows) = capacity.load_table(replica, images=64, seed=0)
    assert [row[0] for row in rows] == ["30%", "50%", "70%", "80%", "90%", "95%"]
    assert all(len(row) == len(head) for row in rows)
    busy = [int(row[-1].rstrip("%")) for row in rows]
    assert busy == sorted(busy)
    lines = capacity.table(capacity.policy_table(replica, images=64, share=0.7, seed=0)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| least outstanding",
        "| two choices",
        "| round robin",
        "| random",
    ]
