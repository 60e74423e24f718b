"""Sources of settings: flags, then UNROLL_* of the environment, then the file of `--config`."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from unroll_server.config import Settings, Tuning
from unroll_server.errors import StartupError

_TUNING = "tuning"
_LONGEST = 80
"""Most characters of a value in an error."""


class _Given(NamedTuple):
    """A value and the name under which it was given."""

    value: Any
    name: str


class Sources:
    """Given values by name of the setting; a nested name is `tuning.max_lanes`."""

    def __init__(self, given: Mapping[str, _Given]) -> None:
        self._given = given

    @classmethod
    def read(cls, flags: Mapping[str, Any]) -> Self:
        """Collects the given values.

        Args:
            flags: Values of the given flags by setting.

        Raises:
            StartupError: the file can't be read or holds an unknown key, or a variable has an old or unknown name.
        """
        given = {name: _Given(value, flag(name)) for name, value in flags.items()}
        _refuse_moved_variables()
        for name, value in _flat(EnvSettingsSource(Settings)()):
            given.setdefault(name, _Given(value, variable(name)))
        file = given.get("config")
        if file is not None:
            for name, value in _flat(_file(file)):
                key = f"{name} in {file.value}"
                if name == "config":
                    raise StartupError(f"{key}: a file can't name another; use {flag(name)} or {variable(name)}")
                if name not in _SCHEMAS:
                    raise StartupError(f"{key}: unknown{suggestion(name)}")
                given.setdefault(name, _Given(value, key))
        return cls(given)

    def settings(self) -> Settings:
        """Returns the validated settings.

        Raises:
            StartupError: a value is invalid, or a required one is missing.
        """
        values: dict[str, Any] = {}
        # Names with a dot come first: a `tuning` that is not a table then replaces them and is refused.
        for name, given in sorted(self._given.items(), key=lambda each: "." not in each[0]):
            table, _, key = name.rpartition(".")
            (values.setdefault(table, {}) if table else values)[key] = given.value
        try:
            return Settings(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise StartupError(f"{flag(name)}: required; or set {variable(name)}, or {name} in --config") from None
            if first["type"] == "extra_forbidden":
                raise StartupError(f"{self._given[name].name}: unknown{suggestion(name, variable)}") from None
            raise StartupError(f"{self._given[name].name}: {_problem(name, first['input'])}") from None

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Makes errors of startup name a setting as it was given: `UNROLL_LISTEN: ...` instead of `--listen: ...`."""
        try:
            yield
        except StartupError as error:
            subject, separator, problem = str(error).partition(": ")
            raise StartupError(re.sub(r"--[a-z-]+", self._name_of, subject) + separator + problem) from None

    def _name_of(self, found: re.Match[str]) -> str:
        given = self._given.get(found[0][2:].replace("-", "_"))
        return given.name if given else found[0]


def flag(name: str) -> str:
    """Returns a setting's flag; for one of `tuning`, the alternatives."""
    return f"{name} in --config or {variable(name)}" if "." in name else "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Returns a setting's environment variable."""
    return "UNROLL_" + name.upper().replace(".", "_")


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON schema of a setting's values, without None."""
    found: dict[str, Any] = _SCHEMAS[name]
    return found | next((each for each in found.get("anyOf", ()) if each["type"] != "null"), {})


def suggestion(name: str, spelled: Callable[[str], str] = str) -> str:
    """Returns the end of an error for an unknown name: the nearest setting, also one of the other table."""
    by_key = {known.rpartition(".")[2]: known for known in _SCHEMAS}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_key, n=1)
    return f"; did you mean {spelled(by_key[close[0]])}?" if close else "; unroll-serve --help lists the settings"


_SCHEMAS = Settings.model_json_schema()["properties"] | {
    f"{_TUNING}.{name}": each for name, each in Tuning.model_json_schema()["properties"].items()
}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name == _TUNING and isinstance(value, dict):
            yield from ((f"{name}.{key}", each) for key, each in value.items())
        else:
            yield name, value


def _file(file: _Given) -> dict[str, Any]:
    path = Path(file.value)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        # Neither UTF-8 nor TOML, or a name with NUL.
        reason = str(error)
    raise StartupError(f"{file.name}: can't read {path}: {reason}")


def _refuse_moved_variables() -> None:
    # A setting of `tuning` by a name without TUNING would have no effect.
    for name in Tuning.model_fields:
        if os.environ.get(variable(name)):
            raise StartupError(f"{variable(name)}: unknown; did you mean {variable(f'{_TUNING}.{name}')}?")


def _problem(name: str, value: Any) -> str:
    match schema(name):
        case {"enum": names}:
            expected = "one of " + ", ".join(names)
        case {"type": "boolean"}:
            expected = "true or false"
        case {"type": "integer", "minimum": least, "maximum": most}:
            expected = f"an integer from {least} to {most}"
        case {"type": "number", "minimum": least, "maximum": most}:
            expected = f"a number of seconds from {least} to {most:.0f}"
        case {"type": "number", "exclusiveMinimum": least, "maximum": most}:
            expected = f"a number of seconds above {least}, {most:.0f} at most"
        case {"type": "string"}:
            # The value is not repeated: it can hold a password.
            return "must be text, not empty and without NUL"
        case _:
            expected = "a table"
    shown = json.dumps(value, default=str)
    return f"must be {expected}, not {shown if len(shown) <= _LONGEST else shown[:_LONGEST] + '...'}"
