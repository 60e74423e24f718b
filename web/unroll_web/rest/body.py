"""Bodies of requests: decompression and JSON, checked member by member."""

import base64
import json
import zlib
from typing import Any, NoReturn

from starlette.requests import Request

from unroll_proto.snapshot import Snapshot
from unroll_web.context import Context
from unroll_web.problems import Problem, too_large
from unroll_web.rest.floats import FORMATS

# zlib's number for "gzip or zlib, as the data says".
_ANY_HEADER = zlib.MAX_WBITS | 32


async def read_body(request: Request, context: Context) -> bytes:
    """Reads a body, decompressed within the limit of the process.

    Raises:
        Problem: it is too large, or its encoding is unknown.
    """
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Problem(415, f"content-encoding: gzip or deflate expected, got {encoding[:64]!r}")
    limit = context.settings.max_body_bytes
    inflating = zlib.decompressobj(_ANY_HEADER)
    try:
        data = inflating.decompress(body, limit + 1)
    except zlib.error:
        raise Problem(400, f"content-encoding: the body is not {encoding}") from None
    if len(data) > limit:
        raise too_large(limit)
    if not inflating.eof:
        raise Problem(400, f"content-encoding: the {encoding} body is cut off")
    return data


def parse_json(data: bytes, where: str = "body") -> "Members":
    """Parses a JSON object.

    Raises:
        Problem: it is not one.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Problem.at(where, f"not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Problem.at(where, f"a JSON object expected, got {_kind(value)}")
    return Members(value)


async def read_json(request: Request, context: Context) -> "Members":
    """Reads a body that is a JSON object.

    Raises:
        Problem: it is not one, or not within the limits.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, f"content-type: application/json expected, got {kind[:64]!r}")
    return parse_json(await read_body(request, context))


class Members:
    """Members of a JSON object, each taken once.

    Args:
        value: The object.
        where: Its place in the body, for errors: empty, or ending with a dot.
    """

    def __init__(self, value: dict[str, Any], where: str = "") -> None:
        self._left = dict(value)
        self._where = where
        self._known: list[str] = []

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """Takes a member.

        Args:
            name: Its name.
            kind: Its type in Python; `object` for any.
            default: Value if it is absent; None makes it required.

        Raises:
            Problem: it is absent, or of another type.
        """
        self._known.append(name)
        field = f"{self._where}{name}"
        if name not in self._left:
            if default is None:
                raise Problem.at(field, "required")
            return default
        value = self._left.pop(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Problem.at(field, f"{_NAMES[kind]} expected, got {_kind(value)}")
        if isinstance(value, str) and not value.isascii():
            check_text(value, field)
        return value

    def version(self) -> int:
        """Takes `version`, a model version; 0 is the newest."""
        value: int = self.take("version", int, 0)
        if not 0 <= value < 2**32:
            raise Problem.at(f"{self._where}version", f"{value}, 0 to {2**32 - 1} expected")
        return value

    def floats(self) -> str:
        """Takes `floats`, the form of arrays in the answer."""
        return self.choice("floats", FORMATS)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Takes one of some words; the first is the default."""
        value: str = self.take(name, str, allowed[0])
        if value not in allowed:
            raise Problem.at(f"{self._where}{name}", f"{' or '.join(allowed)} expected, got {value[:64]!r}")
        return value

    def end(self) -> None:
        """Refuses members that were not taken.

        Raises:
            Problem: there are some.
        """
        for name in self._left:
            what = f"unknown; the members here are {', '.join(self._known)}"
            raise Problem.at(f"{self._where}{printable(name)}", what)


def read_snapshot(value: Any, field: str) -> Snapshot:
    """Decodes a snapshot in base64.

    Raises:
        Problem: it is not one.
    """
    try:
        return Snapshot.from_bytes(base64.b64decode(value, validate=True))
    except (TypeError, ValueError) as error:
        reason = str(error) if "snapshot" in str(error) else "a snapshot in base64 expected"
        raise Problem.at(field, reason) from None


def check_text(value: str, field: str) -> None:
    """Raises Problem if a text is not Unicode: JSON can hold half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem.at(field, "the text has a lone surrogate") from None


def printable(name: str) -> str:
    """Returns a caller's name for an error, in at most 64 ASCII characters."""
    return ascii(name[:64])[1:-1]


_NAMES = {str: "a string", bool: "true or false", int: "an integer", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "a number" if isinstance(value, float) else _NAMES[type(value)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
