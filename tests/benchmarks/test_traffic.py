"""Every kind of the soak test's traffic gets its expected status from the service."""

import asyncio
from collections import Counter

import httpx
import pytest

from benchmarks.client import connect
from benchmarks.soak import Footprint, Tally, violations
from benchmarks.traffic import TrafficKind, traffic_kinds


@pytest.fixture(scope="module")
def kinds() -> list[TrafficKind]:
    return traffic_kinds()


def test_weights_add_up_to_a_thousand(kinds: list[TrafficKind]) -> None:
    assert sum(kind.weight for kind in kinds) == 1000


@pytest.mark.anyio
@pytest.mark.slow
async def test_every_kind_gets_its_expected_status(kinds: list[TrafficKind], bundled: httpx.Client) -> None:
    for kind in kinds:
        for request in kind.requests[:2]:
            connection = await connect(bundled.base_url.port or 0)
            status = await asyncio.wait_for(kind.behaviour(connection, request), 30)
            assert status == kind.status, kind.name
            connection.close()


def test_tally_separates_rejections_from_wrong_statuses(kinds: list[TrafficKind]) -> None:
    tally = Tally()
    for status in (200, 200, 429, 500):
        tally.add(kinds[0], status, seconds=0.1)
    assert (tally.expected, tally.rejected, tally.wrong) == (2, 1, [500])


def test_violations_name_losses_and_leaks() -> None:
    before, after = Footprint(100, 10, 0), Footprint(200, 11, 3)
    lost = Tally(wrong=[500], lost=Counter({"TimeoutError on a new connection": 1}))
    assert len(violations({"form": lost}, before, after)) == 5
    assert violations({"form": Tally()}, before, before) == []
