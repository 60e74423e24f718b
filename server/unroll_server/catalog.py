"""The models that are served, by name and version, and who still needs those that are not served any more."""

from collections import Counter
from collections.abc import Callable, Iterable

from unroll_server.errors import InvalidRequestError, ModelNotFoundError
from unroll_server.metrics import Metrics
from unroll_server.models import Model
from unroll_server.types import ModelKey


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
    """

    def __init__(self, models: Iterable[Model] = (), metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self.models: list[Model] = []
        self.leaving: list[Model] = []
        self.on_free: Callable[[], None] = lambda: None
        self._by_key: dict[ModelKey, Model] = {}
        self._newest: dict[str, Model] = {}
        self._holders: Counter[Model] = Counter()
        for model in models:
            self._by_key[model.spec.key] = model
        self._index()

    def find(self, name: str, version: int, field: str = "model", resumes: bool = False) -> Model:
        """The model of that name and version.

        Args:
            name: Empty means the only model served.
            version: 0 means the newest.
            field: Where the name stands in the request.
            resumes: Whether the work goes on with a sequence that began on this version, by its snapshot or session:
                then one that takes no new work is found too, as long as it is loaded.

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
        if version and (model := self._by_key.get(ModelKey(name, version))):
            return model
        if version and resumes:
            for model in reversed(self.leaving):
                if model.spec.key == (name, version):
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
                self.on_free()

    def holders(self, model: Model) -> int:
        """How many sequences hold a model."""
        return self._holders[model]

    def _index(self) -> None:
        self.models = sorted(self._by_key.values(), key=lambda model: model.spec.key)
        self._newest = {model.spec.key.name: model for model in self.models}
