"""The shadow over HTTP: responses, card, metrics, promotion."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.model import weights
from app.settings import Settings
from tests.conftest import EXAMPLES, serving, untrained, write
from tests.support.subprocesses import fails, wait_until

KEY = {"x-api-key": "secret"}
LOAD = "/v2/repository/models/served/load"
FILES = [(EXAMPLES / f"{name}.png").read_bytes() for name in ("cat", "ship", "chelsea")]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "served.safetensors"
    write(path, untrained("served", 8))
    return path


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    path = tmp_path / "candidate.safetensors"
    write(path, untrained("served", 8, ["bright", "dark"], 48, seed=1))
    return path


def settings(served: Path, **more: object) -> Settings:
    return Settings(weights=served, max_batch=16, weights_poll_s=0.05, api_keys="secret", **more)


def predict(client: httpx.Client) -> httpx.Response:
    return client.post("/predict", files=[("file", ("x.png", file)) for file in FILES], headers=KEY)


def shadow(client: httpx.Client) -> Any:
    return client.get("/model").json()["shadow"]


@pytest.mark.slow
def test_responses_are_the_same_with_and_without(served: Path, candidate: Path) -> None:
    with serving(settings(served)) as client:
        expected = predict(client).content
        assert shadow(client) is None
    with serving(settings(served, shadow_weights=candidate, shadow_sample=1)) as client:
        wait_until(lambda: shadow(client) is not None)
        assert {predict(client).content for _ in range(10)} == {expected}
        wait_until(lambda: shadow(client)["images"] >= 3)
        card = shadow(client)
        assert card["version"] == weights.load(candidate).version
        assert card["agreement"] == 0.0  # no class in common
        wait_until(lambda: 'agrees="false"' in client.get("/metrics").text)  # counted after the pass


@pytest.mark.slow
def test_a_copy_of_the_model_agrees_on_every_image(served: Path) -> None:
    with serving(settings(served, shadow_weights=served, shadow_sample=1)) as client:
        wait_until(lambda: shadow(client) is not None)
        labels = {prediction["label"] for prediction in predict(client).json()["predictions"]}
        wait_until(lambda: shadow(client)["images"] == 3)
        card = shadow(client)
        assert card["agreement"] == 1.0
        assert set(card["classes"]) == labels
        wait_until(lambda: shadow(client)["ms_per_image"] > 0)  # counted after the pass


@pytest.mark.slow
def test_a_load_with_the_version_of_the_shadow_promotes_it(served: Path, candidate: Path) -> None:
    old, new = weights.load(served).version, weights.load(candidate).version
    with serving(settings(served, shadow_weights=candidate)) as client:

        def load(**parameters: str) -> httpx.Response:
            return client.post(LOAD, headers=KEY, json={"parameters": parameters})

        wait_until(lambda: shadow(client) is not None)
        wrong = load(version="00000000")
        assert (wrong.status_code, predict(client).json()["model"]["version"]) == (400, old)
        assert load(version=new).json()["parameters"] == {"weights_version": new}
        assert predict(client).json()["model"]["version"] == new
        assert {each["label"] for each in predict(client).json()["predictions"]} <= {"bright", "dark"}
        assert shadow(client) is None
        assert load().json()["parameters"] == {"weights_version": new}  # the file served before
        assert load(version=old).json()["parameters"] == {"weights_version": old}


@pytest.mark.slow
def test_a_bad_candidate_leaves_the_service_without_shadow(served: Path, candidate: Path) -> None:
    good = candidate.read_bytes()
    candidate.write_bytes(good[:1000])
    with serving(settings(served, shadow_weights=candidate)) as client:
        assert predict(client).status_code == 200
        assert shadow(client) is None
        candidate.write_bytes(good)
        wait_until(lambda: shadow(client) is not None)


@pytest.mark.slow
def test_several_processes_run_no_shadow(served: Path, candidate: Path) -> None:
    log = fails("--weights", str(served), "--shadow-weights", str(candidate), "--workers", "2", "--port", "0")
    assert log.strip().endswith("THIRTYTWO_SHADOW_WEIGHTS needs one HTTP process; THIRTYTWO_WORKERS is 2.")
