"""The replacement of the model, with small networks on the real engine and no HTTP."""

import asyncio
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import WeightsError
from app.inference.classifier import Classifier
from app.inference.pipeline import Deadline, Pipeline
from app.inference.repository import Outcome, Repository
from app.inference.shadow import Shadow
from app.lifespan import build_pipeline
from app.model.weights import Weights
from app.settings import Settings
from app.sources import FileSource, load_engine
from tests.conftest import untrained
from tests.support.images import LARGE, SMALL

SETTINGS = Settings(max_batch=4, weights=Path("unused"))
OLD = untrained("old", 8)._replace(sha256="0" * 64)
NEW = untrained("new", 8, ["bright", "dark"], 16, seed=1)._replace(sha256="1" * 64)


def build(file: Weights) -> Classifier:
    return FileSource(SETTINGS, load_engine).build(file)


class Running:
    """A pipeline on OLD, and a repository whose `read` is called instead of reading a file."""

    def __init__(self, read: Callable[[], Weights] = lambda: NEW) -> None:
        self.pipeline: Pipeline = build_pipeline(SETTINGS, build(OLD))
        self.outcomes: list[Outcome] = []
        self.switched: list[Classifier] = []
        self.repository = Repository(self.pipeline, read, build, self.switched.append, self.outcomes.append)

    def __enter__(self) -> "Running":
        self.pipeline.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pipeline.close(5)

    @property
    def serving(self) -> str:
        return self.pipeline.classifier.weights.card.name


def test_requests_after_the_load_run_on_the_new_model() -> None:
    async def main() -> None:
        with Running() as running:
            before = await running.pipeline.classify([SMALL], Deadline.after(30))
            assert await running.repository.load() == "success"
            after = await running.pipeline.classify([SMALL, LARGE], Deadline.after(30))
        assert [len(each.probabilities) for each in before.outcomes] == [10]
        assert [len(each.probabilities) for each in after.outcomes] == [2, 2]
        assert running.outcomes == ["success"]
        assert running.switched == [running.pipeline.classifier]

    asyncio.run(main())


def test_later_batches_have_the_sizes_of_the_new_model() -> None:
    smaller = SETTINGS.model_copy(update={"max_batch": 2})
    with Running() as running:
        assert running.pipeline.batcher.max_batch == 4
        running.pipeline.replace(FileSource(smaller, load_engine).build(NEW))
        assert running.pipeline.batcher.max_batch == 2


def test_a_file_of_the_same_version_is_not_built() -> None:
    async def main() -> None:
        with Running(lambda: OLD) as running:
            classifier = running.pipeline.classifier
            assert await running.repository.load() == "unchanged"
            assert running.pipeline.classifier is classifier

    asyncio.run(main())


@pytest.mark.parametrize("error", [WeightsError("x.safetensors is not a safetensors file."), MemoryError("no room")])
def test_a_failed_load_is_one_log_line_and_changes_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def read() -> Weights:
        raise error

    async def main() -> None:
        with Running(read) as running, caplog.at_level(logging.INFO, "app.inference.repository"):
            classifier = running.pipeline.classifier
            caplog.clear()
            assert await running.repository.load() == "failure"
            assert running.pipeline.classifier is classifier
            assert (running.outcomes, running.switched) == (["failure"], [])
            await running.pipeline.classify([SMALL], Deadline.after(30))

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records if record.name == "app.inference.repository"] == [
        f"model: old 00000000 stays: {error}"
    ]


def test_a_model_that_misses_its_references_is_refused() -> None:
    wrong = NEW._replace(reference_probabilities=NEW.reference_probabilities[:, ::-1] * 0.5)

    async def main() -> None:
        with Running(lambda: wrong) as running:
            assert await running.repository.load() == "failure"
            assert running.serving == "old"

    asyncio.run(main())


def test_concurrent_loads_run_one_after_the_other() -> None:
    async def main() -> None:
        with Running() as running:
            await asyncio.gather(*(running.repository.load() for _ in range(3)))
            assert running.outcomes == ["success", "unchanged", "unchanged"]

    asyncio.run(main())


def test_the_event_loop_runs_during_a_load() -> None:
    """A load takes many turns of another task, which a load on the event loop would not give."""

    async def main() -> None:
        with Running() as running:
            load, turns = asyncio.create_task(running.repository.load()), 0
            while not load.done():
                turns += 1
                await running.pipeline.classify([SMALL], Deadline.after(30))
            assert turns > 5

    asyncio.run(main())


def test_the_former_model_is_released_after_its_last_request() -> None:
    async def main() -> None:
        with Running() as running:
            engine = weakref.ref(running.pipeline.classifier.engine)
            last = asyncio.create_task(running.pipeline.classify([LARGE] * 8, Deadline.after(60)))
            await asyncio.sleep(0)
            assert await running.repository.load() == "success"
            if not last.done():
                assert engine() is not None
            assert [len(each.probabilities) for each in (await last).outcomes] == [10] * 8
            del last
            while engine() is not None:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_shadow_that_was_replaced_meanwhile_is_not_promoted(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with Running() as running:
            shadow = Shadow(running.pipeline.limits, 1.0, lambda: False)
            shadow.replace(build(NEW))
            assert await running.repository.promote(shadow, OLD.version) == "failure"
            assert (running.serving, running.outcomes) == ("old", ["failure"])
            assert await running.repository.promote(shadow, NEW.version) == "success"
            assert (running.serving, shadow.classifier) == ("new", None)

    asyncio.run(main())
    assert any("the shadow no longer has the version 00000000" in message for message in caplog.messages)


def test_version_is_checked_again_after_the_build() -> None:
    async def main() -> None:
        with Running() as running:
            repository = Repository(running.pipeline, lambda: NEW, lambda file: build(OLD))
            assert await repository.load(NEW.version) == "failure"

    asyncio.run(main())
