"""The processes of a server, asked as one: each does what it is told, and the answer says where one did not."""

from collections import defaultdict
from collections.abc import Sequence

import grpc
from google.rpc import status_pb2

from unroll_engine.errors import shortened
from unroll_proto.v1 import admin_pb2 as pb
from unroll_server.workers.rpc import Ask, GoneError, RefusedError

_GONE = grpc.StatusCode.UNAVAILABLE.value[0]


class StatusError(Exception):
    """A call ends with a status.

    Attributes:
        status: The status.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class Processes:
    """All processes that serve the models.

    Args:
        asks: How each is asked.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asks = asks

    async def ask(self, number: int, method: str, request: bytes) -> bytes:
        """What one process answers.

        Raises:
            StatusError: it refused, or is not there.
        """
        try:
            return await self.asks[number](method, request)
        except RefusedError as error:
            status = status_pb2.Status.FromString(error.status)
        except GoneError:
            status = status_pb2.Status(code=_GONE, message="it is not there now; ask again")
        if len(self.asks) > 1:
            status.message = f"worker {number}: {status.message}"
        raise StatusError(status)

    async def ask_all(self, method: str, request: bytes, harmless: int | None = None) -> list[bytes]:
        """What every process answers, one after the other: loading a model takes a core, and measures how fast it is.

        Args:
            method: What is asked.
            request: With what.
            harmless: The code of a refusal that does not count where any process does not refuse.

        Raises:
            StatusError: at least one refused; all were asked. It has the first one's code and what each said.
        """
        answers: list[bytes] = []
        refusals: list[status_pb2.Status] = []
        for number in range(len(self.asks)):
            try:
                answers.append(await self.ask(number, method, request))
            except StatusError as error:
                refusals.append(error.status)
        if answers:
            refusals = [status for status in refusals if status.code != harmless]
        if refusals:
            # One that is only away says least.
            first = next((status for status in refusals if status.code != _GONE), refusals[0])
            first.message = shortened("; ".join(status.message for status in refusals))
            raise StatusError(first)
        return answers

    async def ask_any(self, method: str, request: bytes) -> bytes:
        """What the first process answers that is there, about what they share.

        Raises:
            StatusError: it refused, or none is there.
        """
        for number in range(len(self.asks)):
            try:
                return await self.ask(number, method, request)
            except StatusError as error:
                if error.status.code != _GONE or number == len(self.asks) - 1:
                    raise
        raise AssertionError("there is at least one process")


def merged_versions(answers: Sequence[bytes]) -> pb.ListVersionsResponse:
    """The versions that all processes have; the reason of one says so where they differ.

    Such a version has the state of a process that does not serve it.
    """
    found: dict[tuple[str, int], list[tuple[int, pb.ModelVersion]]] = defaultdict(list)
    for number, answer in enumerate(answers):
        for version in pb.ListVersionsResponse.FromString(answer).versions:
            found[version.model, version.version].append((number, version))
    merged = pb.ListVersionsResponse()
    for key in sorted(found):
        versions = found[key]
        chosen = next((version for _, version in versions if version.state != pb.VERSION_STATE_READY), versions[0][1])
        if len(versions) < len(answers) or any(version.state != chosen.state for _, version in versions):
            # Workers load one after the other, and one that was started again may be behind.
            states = "; ".join(
                f"worker {number}: {pb.VersionState.Name(version.state).removeprefix('VERSION_STATE_')}"
                for number, version in versions
            )
            chosen.reason = f"{chosen.reason} ({states})" if chosen.reason else states
        merged.versions.append(chosen)
    return merged
