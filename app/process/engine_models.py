"""The models of the engine process: the one that serves, and former ones that a front end still uses."""

import asyncio

from app import engines, memory
from app.engines.channel import Description, Layout
from app.engines.server import EngineModel
from app.inference.classifier import Classifier
from app.model.file_watch import Fingerprint
from app.sources import FileSource

CHANNELS = 2  # concurrent calls of a front end: the next batch is on its way while one runs


class HostedModel:
    """`channels` is the number of open channels to it; it belongs to the event loop."""

    def __init__(self, classifier: Classifier, file: Fingerprint | None) -> None:
        self.classifier = classifier
        self.file = file  # when it was read last
        self.cost = classifier.cost  # measured in the thread of the load
        self.engine_model = EngineModel(classifier.run, classifier.verify)
        self.channels = 0

    @property
    def description(self) -> Description:
        classifier, engine = self.classifier, self.classifier.engine
        layout = Layout(max(classifier.batch_sizes), classifier.input_size, len(classifier.classes))
        card = classifier.weights.card.model_dump(mode="json")
        sha256 = classifier.weights.sha256
        return Description(
            engine.name, engine.device, engine.precision, sha256, card, layout, self.cost, CHANNELS, self.file
        )


class EngineModels:
    """Belongs to one event loop. Loads run in a thread. Construction raises what the source raises."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._loading = asyncio.Lock()
        self._next: asyncio.Task[HostedModel] | None = None  # a load that has not read the file yet
        self._former: set[HostedModel] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self.current = HostedModel(*source.start())

    async def load(self) -> HostedModel:
        """The model of the file that is there now, built once for each digest. Raises what reading or building raises.

        Calls that wait share one load: each gets a file that was read after its call.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._load_next())
        return await asyncio.shield(self._next)

    async def _load_next(self) -> HostedModel:
        async with self._loading:
            self._next = None
            former, self.current = self.current, await asyncio.to_thread(self._read)
            if former is not self.current:
                self._former.add(former)
                self._release(former)
            return self.current

    def _read(self) -> HostedModel:
        """The file's model, ready to serve; the current one if it is the same."""
        file, loaded = self._source.fingerprint(), self._source.read()
        if loaded.sha256 == self.current.classifier.weights.sha256:
            self.current.file = file
            return self.current
        model = HostedModel(self._source.build(loaded), file)
        memory.trim()  # of the compilation
        return model

    def open_channels(self) -> HostedModel:
        """The current model, with channels for one more front end."""
        self.current.channels += CHANNELS
        return self.current

    def close_channels(self, engine_model: EngineModel, count: int = 1) -> None:
        """A front end has closed channels to this model."""
        for model in (self.current, *self._former):
            if model.engine_model is engine_model:
                model.channels -= count
                self._release(model)

    def _release(self, model: HostedModel) -> None:
        """Drops a former model without channels, in a thread, since its engine stops its threads then."""
        if model in self._former and not model.channels:
            self._former.remove(model)
            release = asyncio.to_thread(engines.release, [model], model.classifier.engine.device)
            task = asyncio.create_task(release)
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
