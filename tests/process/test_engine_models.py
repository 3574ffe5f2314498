"""The models of the engine process: loads, and the release of former ones, on real files and a fake engine."""

import asyncio
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.engines import Output
from app.errors import WeightsError
from app.model.weights import Weights
from app.process.engine_models import CHANNELS, EngineModels
from app.settings import Settings
from app.sources import FileSource
from tests.conftest import untrained, write


class Engine:
    name, device, precision, streams = "fake", "cpu", "float32", 1

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        return Output(np.zeros((len(images), self._classes), np.float32), np.zeros(len(images), np.uint8))

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        pass

    def memory(self) -> None:
        return None


class Builds:
    """Builds engines, while `gate` is set, and records the names of their files."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, weights: Weights, settings: Settings) -> Engine:
        self.entered.set()
        assert self.gate.wait(30)
        self.names.append(weights.card.name)
        return Engine(len(weights.card.classes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "served.safetensors"
    write(path, untrained("first", 8))
    return path


def models_of(path: Path, builds: Builds) -> EngineModels:
    return EngineModels(FileSource(Settings(weights=path, max_batch=4), builds))


def replace(path: Path, name: str, seed: int = 1) -> None:
    copy = path.with_name("copy")
    write(copy, untrained(name, 8, ["bright", "dark"], 16, seed))
    copy.replace(path)


def name(models: EngineModels) -> str:
    return models.current.classifier.weights.card.name


def test_concurrent_loads_build_a_file_once(path: Path) -> None:
    async def main() -> None:
        builds = Builds()
        models = models_of(path, builds)
        replace(path, "second")
        loaded = await asyncio.gather(*(models.load() for _ in range(5)))
        assert {model.classifier.weights.card.name for model in loaded} == {"second"}
        assert await models.load() is models.current
        assert builds.names == ["first", "second"]
        assert models.current.description.layout.classes == 2

    asyncio.run(main())


def test_load_gets_a_file_that_was_read_after_the_call(path: Path) -> None:
    async def main() -> None:
        builds = Builds()
        models = models_of(path, builds)
        builds.gate.clear()
        builds.entered.clear()
        replace(path, "second")
        first = asyncio.create_task(models.load())
        await asyncio.to_thread(builds.entered.wait, 30)
        replace(path, "third", seed=2)
        others = [asyncio.create_task(models.load()) for _ in range(3)]
        await asyncio.sleep(0)
        builds.gate.set()
        assert (await first).classifier.weights.card.name == "second"
        assert {(await other).classifier.weights.card.name for other in others} == {"third"}
        assert builds.names == ["first", "second", "third"]

    asyncio.run(main())


def test_bad_file_leaves_the_model(path: Path) -> None:
    async def main() -> None:
        models = models_of(path, Builds())
        path.write_bytes(path.read_bytes()[:1000])
        for _ in range(2):
            with pytest.raises(WeightsError):
                await models.load()
        assert name(models) == "first"
        replace(path, "second")
        await models.load()
        assert name(models) == "second"

    asyncio.run(main())


def test_former_model_is_released_with_its_last_channel(path: Path) -> None:
    async def main() -> None:
        models = models_of(path, Builds())
        engine_models = [models.open_channels().engine_model for _ in range(2)]
        engine = weakref.ref(models.current.classifier.engine)
        replace(path, "second")
        await models.load()
        models.close_channels(engine_models.pop(), CHANNELS)
        models.close_channels(engine_models[0])
        await asyncio.sleep(0.05)
        assert engine() is not None
        models.close_channels(engine_models.pop())
        await released(engine)
        assert name(models) == "second"

    asyncio.run(main())


def test_former_model_without_channels_is_released(path: Path) -> None:
    async def main() -> None:
        models = models_of(path, Builds())
        engine = weakref.ref(models.current.classifier.engine)
        replace(path, "second")
        await models.load()
        await released(engine)

    asyncio.run(main())


async def released(engine: "weakref.ref[object]") -> None:
    async with asyncio.timeout(30):
        while engine() is not None:
            await asyncio.sleep(0.01)
