"""The models that are served, by name and version."""

from collections.abc import Iterable

from unroll_server.errors import InvalidRequestError, ModelNotFoundError
from unroll_server.models import Model
from unroll_server.types import ModelKey


class Catalog:
    """Finds the model that a request means.

    Args:
        models: What is served; at least one.
    """

    def __init__(self, models: Iterable[Model]) -> None:
        self.models = sorted(models, key=lambda model: model.spec.key)
        self._by_key = {model.spec.key: model for model in self.models}
        self._newest = {model.spec.key.name: model for model in self.models}

    def find(self, name: str, version: int, field: str = "model") -> Model:
        """The model of that name and version.

        Args:
            name: Empty means the only model served.
            version: 0 means the newest.
            field: Where the name stands in the request.

        Raises:
            ModelNotFoundError: no such model, or no such version of it, is served.
            InvalidRequestError: no name is given and several models are served.
        """
        if not name:
            if len(self._newest) > 1:
                raise InvalidRequestError(f"which one? served are {', '.join(self._newest)}", field)
            name = next(iter(self._newest))
        newest = self._newest.get(name)
        if newest is None:
            raise ModelNotFoundError(f"no model {name!r}; served are {', '.join(self._newest)}", field)
        if not version:
            return newest
        if model := self._by_key.get(ModelKey(name, version)):
            return model
        served = ", ".join(str(model.spec.key.version) for model in self.models if model.spec.key.name == name)
        place = field.removesuffix("model") + "version"
        raise ModelNotFoundError(f"no version {version} of {name!r}; served are {served}", place)
