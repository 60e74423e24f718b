"""The models that are served, by name and version, and who still needs those that are not served any more."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from unroll_engine.errors import InvalidRequestError, ModelNotFoundError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey
from unroll_server.telemetry.metrics import Metrics


class Catalog:
    """Finds the model that a request means. Used on one event loop.

    A model leaves in two steps: `retire` takes it away from new work, while sequences that began on it go on; `forget`
    ends it, once nobody holds it.

    Args:
        models: What is served at first.
        metrics: Counts the sequences that are open.

    Attributes:
        models: What takes new work, by name and version.
        leaving: Retired ones that are not yet forgotten, in the order of their retirement.
        on_free: Called when the last holder of a retired model releases it.
        freed: How often that was.
    """

    def __init__(self, models: Iterable[Model] = (), metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self.models: list[Model] = []
        self.leaving: list[Model] = []
        self.on_free: Callable[[], None] = lambda: None
        self.freed = 0
        self._by_key: dict[ModelKey, Model] = {}
        self._newest: dict[str, Model] = {}
        self._holders: Counter[Model] = Counter()
        for model in models:
            self._by_key[model.spec.key] = model
        self._index()

    def find(self, name: str, version: int, field: str = "model", resumes: bytes | None = None) -> Model:
        """The model of that name and version.

        Args:
            name: Empty means the only model served.
            version: 0 means the newest.
            field: Where the name stands in the request.
            resumes: The bundle of the snapshot or session that the work goes on with, empty where it is not told: a
                version that takes no new work is found too, as long as it is loaded, the content of that bundle first.

        Raises:
            ModelNotFoundError: no such model, or no such version of it, is served.
            InvalidRequestError: no name is given and several models are served.
        """
        if not name:
            if len(self._newest) > 1:
                raise InvalidRequestError(f"which one? served are {', '.join(self._newest)}", field)
            if not self._newest:
                raise ModelNotFoundError("none is served", field)
            name = next(iter(self._newest))
        model = self._by_key.get(ModelKey(name, version))
        if version and resumes is not None and (model is None or resumes != model.spec.bundle):
            left = [leaving for leaving in reversed(self.leaving) if leaving.spec.key == (name, version)]
            begun_on = (leaving for leaving in left if leaving.spec.bundle == resumes)
            model = next(begun_on, model or next(iter(left), None))
        if model:
            return model
        newest = self._newest.get(name)
        if newest is None:
            served = f"; served are {', '.join(self._newest)}" if self._newest else ", none is served"
            raise ModelNotFoundError(f"no model {name!r}{served}", field)
        if not version:
            return newest
        served = ", ".join(str(model.spec.key.version) for model in self.models if model.spec.key.name == name)
        place = field.removesuffix("model") + "version"
        raise ModelNotFoundError(f"no version {version} of {name!r}; served are {served}", place)

    def add(self, model: Model) -> None:
        """Gives new work to a model; one of the same name and version is retired."""
        replaced = self._by_key.get(model.spec.key)
        self._by_key[model.spec.key] = model
        self._index()
        if replaced:
            self.leaving.append(replaced)

    def retire(self, model: Model) -> None:
        """Takes a served model away from new work."""
        del self._by_key[model.spec.key]
        self._index()
        self.leaving.append(model)

    def forget(self, model: Model) -> None:
        """Ends a retired model."""
        self.leaving.remove(model)

    def hold(self, model: Model) -> None:
        """Notes that a sequence begins on a model, which stays loaded until `release`."""
        self._holders[model] += 1
        self._metrics.of(str(model.spec.key)).opened()

    def release(self, model: Model) -> None:
        """Notes that a sequence that held a model has ended."""
        self._holders[model] -= 1
        self._metrics.of(str(model.spec.key)).closed()
        if not self._holders[model]:
            del self._holders[model]
            if model in self.leaving:
                self.freed += 1
                self.on_free()

    @contextmanager
    def held(self, model: Model) -> Iterator[None]:
        """Holds a model for as long as the context is open."""
        self.hold(model)
        try:
            yield
        finally:
            self.release(model)

    def holders(self, model: Model) -> int:
        """How many sequences hold a model."""
        return self._holders[model]

    def _index(self) -> None:
        self.models = sorted(self._by_key.values(), key=lambda model: model.spec.key)
        self._newest = {model.spec.key.name: model for model in self.models}
