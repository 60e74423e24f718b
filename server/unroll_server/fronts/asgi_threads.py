"""Servicers that are no coroutines: they run in threads, as grpc.aio has it, and see a context without coroutines."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import grpc.aio

from unroll_server.fronts.asgi_call import Call
from unroll_server.fronts.grpc_wire import Metadata

_POOL = ThreadPoolExecutor(thread_name_prefix="unroll-servicer")
_END = object()


async def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that may block."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, function, *arguments)


async def pull(iterator: Iterator[Any]) -> AsyncGenerator[Any, None]:
    """What an iterator yields that may block."""
    while (item := await run(next, iterator, _END)) is not _END:
        yield item


class ThreadedCall:
    """A call's context for a servicer in a thread: grpc.ServicerContext as far as it goes without the loop.

    What it does not override is the call's own, which takes no lock: the servicer is the only one that sets it.

    Args:
        call: The call.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """See grpc.ServicerContext."""
        self._call.set_abort(code, details, trailing_metadata)
        raise grpc.aio.AbortError("the servicer ended the call")

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """See grpc.ServicerContext."""
        self.abort(status.code, status.details, status.trailing_metadata or ())

    def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """See grpc.ServicerContext."""
        sending = self._call.send_initial_metadata(initial_metadata)
        asyncio.run_coroutine_threadsafe(sending, self._call.loop).result()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """See grpc.RpcContext."""
        if self._call.done():
            return False
        self._call.add_done_callback(lambda _: callback())
        return True

    def is_active(self) -> bool:
        """See grpc.RpcContext."""
        return not self._call.done()

    def cancel(self) -> None:
        """See grpc.RpcContext."""
        self._call.loop.call_soon_threadsafe(
            self._call.end_with, grpc.StatusCode.CANCELLED, "Cancelled on the server side"
        )
