"""Client: blocking calls from many threads, and a clean end when it is closed or dropped."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.models import alone
from support.values import random_values
from support.waiting import wait_until
from unit.client.harness import MODEL, LocalServer

from unroll_client import AsyncClient, Client, InvalidArgument, ServerDraining, Steps, SyncSequence, Unavailable


def send_for_ever(sequence: SyncSequence) -> None:
    while True:
        sequence.send(random_values(1))


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "unroll-client"]


def test_all_of_it_blocking(address: str) -> None:
    values = random_values(30)
    logits, states, _ = alone(MODEL, values, None)
    with Client(address, model="m") as client:
        assert client.classify([values]).logits[0].tobytes() == logits[-1].tobytes()
        with client.unroll(logits=True) as sequence:
            first = sequence.send(values[:10])
            parts = list(sequence.stream(values[10:]))
            snapshot = sequence.snapshot()
            assert (sequence.model, sequence.version, sequence.step) == ("m", 1, 30)
        got = [part.states for part in [first, *parts] if part.states is not None]
        assert np.concatenate(got).tobytes() == states.tobytes()
        assert sequence.close() == snapshot
        with client.unroll(snapshot=snapshot) as again:
            for part in again.stream(values):
                assert part.first_step == 30
                break
            assert again.send(values).first_step == 60


def test_many_threads_share_a_client(address: str) -> None:
    def work(seed: int) -> None:
        values = random_values(25, seed)
        logits, states, _ = alone(MODEL, values, None)
        for _ in range(3):
            assert client.classify([values] * 3).logits[2].tobytes() == logits[-1].tobytes()
            with client.unroll() as sequence:
                answer = sequence.send(values)
            assert answer.states is not None
            assert answer.states.tobytes() == states.tobytes()

    with Client(address, model="m") as client, ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(24)))
    assert not client_threads()


def test_closed_is_closed(address: str) -> None:
    client = Client(address, model="m")
    sequence = client.unroll()
    stream = sequence.stream(random_values(60))
    next(stream)
    client.close()
    client.close()
    assert not client_threads()
    stream.close()
    for call in (client.models, client.unroll, sequence.snapshot, lambda: sequence.send(random_values(1))):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    with sequence:
        pass


def test_a_sequence_that_is_kept_keeps_no_connection(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL)
    port = server.port
    client = Client(server.address, model="m")
    sequence = client.unroll()
    sequence.send(random_values(3))
    assert connections_to(port)
    client.close()
    # The library ends them on its own threads.
    wait_until(lambda: not connections_to(port))
    with pytest.raises(RuntimeError, match="the client is closed"):
        sequence.snapshot()


def connections_to(port: int) -> int:
    """Returns the number of established connections of this process to a local port."""
    mine = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # It may be closed by now.
            mine.add(str(path.readlink()))
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    established = [row for row in rows if row[3] == "01" and int(row[2].rpartition(":")[2], 16) == port]
    return sum(f"socket:[{row[9]}]" in mine for row in established)


def test_a_client_that_is_dropped_ends_its_thread(address: str) -> None:
    client = Client(address)
    client.models()
    assert client_threads()
    del client
    gc.collect()
    assert not client_threads()


def test_a_closed_client_fails_calls_of_other_threads(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL)
    client = Client(server.address, wait_for_ready=True)
    client.models()
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        # The client waits for a server.
        waiting = pool.submit(client.models)
        wait_until(waiting.running)
        client.close()
        with pytest.raises((Unavailable, RuntimeError), match="clos"):
            waiting.result(30)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 (its own)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
async def test_only_values_can_be_pickled_and_copied(address: str, duplicate: Callable[[Any], Any]) -> None:
    values = [random_values(5)]
    with Client(address, model="m") as client, client.unroll(logits=True) as sequence:
        kept = [sequence.send(values[0]), sequence.snapshot(), client.model()]
        kept.append(client.classify(values, return_final_states=True))
        kept.append(client.advance("copied", values[0], start=True, return_snapshot=True))
        async with AsyncClient(address) as other:
            for held in (client, other):
                with pytest.raises(TypeError, match=r"Client holds connections .+: make a client in each process"):
                    duplicate(held)
            for open_sequence in (sequence, other.unroll()):
                with pytest.raises(TypeError, match=r"Sequence holds connections .+: send its snapshot\(\)"):
                    duplicate(open_sequence)
    for value in kept:
        assert repr(duplicate(value)) == repr(value)
    assert duplicate(kept[1]) == kept[1]


def test_errors_are_the_same(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL)
    with Client(server.address, reconnect_timeout=0) as client:
        with pytest.raises(InvalidArgument, match=r"sequences\[0\]"):
            client.classify([np.ones(3)])
        with client.unroll() as sequence:
            server.drain()
            with pytest.raises(ServerDraining) as caught:
                send_for_ever(sequence)
        assert caught.value.snapshot.model == "m"


@pytest.mark.parametrize("ending", ["client.close()", "del client", "pass", "raise SystemExit"])
def test_a_process_ends_quietly(address: str, ending: str) -> None:
    program = f"""
import numpy as np
from unroll_client import Client
client = Client({address!r}, model="m")
client.classify([np.ones((4, 3))])
sequence = client.unroll()
sequence.send(np.ones((4, 3)))
{ending}
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_library_needs_neither_torch_nor_the_file_formats() -> None:
    program = (
        "import sys, unroll_client; print({'torch', 'onnxruntime', 'pyarrow', 'rich', 'click'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_left_half_done_may_be_collected_on_the_clients_own_thread(address: str) -> None:
    def states(client: Client) -> Iterator[Steps]:
        with client.unroll() as sequence:
            yield from sequence.stream(random_values(60))

    class Holder:
        """A reference cycle, freed only by the garbage collector."""

        def __init__(self, held: Iterator[Steps]) -> None:
            self.held, self.me = held, self

    class Collecting:
        """A sequence whose reading, on the client's thread, collects garbage."""

        def __array__(self, dtype: object = None, copy: object = None) -> NDArray[np.float32]:
            gc.collect()
            return random_values(5)

    with Client(address, model="m", timeout=10) as client:
        answers = states(client)
        next(answers)
        left = weakref.ref(Holder(answers))
        del answers
        assert len(client.classify([Collecting()])) == 1
        assert left() is None
        with client.unroll() as sequence:
            assert sequence.send(random_values(5)).count == 5
