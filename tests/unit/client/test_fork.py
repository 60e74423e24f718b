"""Forks: a client of the parent or a new one works in the child, or raises at once with a remedy."""

import subprocess
import sys
from textwrap import dedent

import pytest

# `child(work)` forks and returns the child's result or exception of `work`, or how the child died.
PRELUDE = """
import gc, multiprocessing, os, pickle, sys, threading
import numpy as np
from unroll_client import AsyncClient, Client

ADDRESS = {address!r}
VALUES = np.ones((4, 3), np.float32)

def new():
    return Client(ADDRESS, model="m", timeout=20)

def asked(client):
    with client.unroll() as sequence:
        assert sequence.send(VALUES).count == 4
    return client.classify([VALUES]).logits.tobytes()

def outcome(work, *arguments):
    try:
        return work(*arguments)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

def child(work, leave=os._exit):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, pickle.dumps(outcome(work)))
        os.close(writer)
        leave(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    return pickle.loads(answer) if not status else f"died of {{status}}"

def refused(answer):
    assert answer.startswith("RuntimeError: this process was forked while gRPC was in use"), answer
    assert "'spawn'" in answer

def in_flight(client):
    '''Keeps a thread asking and a sequence open; returns what checks that both got on.'''
    stop, counts = threading.Event(), []
    sequence = client.unroll()
    def work():
        while not stop.is_set():
            client.classify([VALUES])
            counts.append(sequence.send(VALUES).count)
    thread = threading.Thread(target=work)
    thread.start()
    def check():
        before = len(counts)
        while len(counts) == before:
            assert thread.is_alive()
            stop.wait(0.001)
        stop.set()
        thread.join()
        sequence.close()
    return check
"""

SCRIPTS = {
    "a client that rests works in the parent, the child and the child's child": """
        client = new()
        expected = asked(client)
        for _ in range(5):
            assert child(lambda: asked(client)) == expected
            assert child(lambda: asked(new())) == expected
            assert asked(client) == expected
        both = lambda: [asked(client), child(lambda: asked(client)), child(lambda: asked(new()))]
        assert child(both) == [expected] * 3
        """,
    "a client that was not used yet, and one that is closed": """
        preloaded, closed = new(), new()
        expected = asked(closed)
        closed.close()
        assert child(lambda: asked(preloaded)) == expected
        assert child(lambda: asked(closed)) == "RuntimeError: the client is closed"
        assert asked(preloaded) == expected
        """,
    "while calls and sequences are in flight, all is refused at once, and the parent does not notice": """
        client, other = new(), new()
        asked(other)
        check = in_flight(client)
        sequence = client.unroll()
        for _ in range(5):
            refused(child(lambda: asked(client)))
            refused(child(lambda: asked(other)))
            refused(child(lambda: asked(new())))
            refused(child(lambda: child(lambda: asked(new()))))
            assert child(lambda: sequence.send(VALUES)).startswith("RuntimeError: the sequence belongs to the process")
        check()
        sequence.close()
        assert child(lambda: asked(client)) == asked(client)
        """,
    "an open sequence counts, and one that was closed or dropped does not": """
        client = new()
        sequence = client.unroll()
        refused(child(lambda: asked(client)))
        assert sequence.send(VALUES).first_step == 0
        sequence.close()
        dropped = client.unroll()
        del dropped
        gc.collect()
        assert child(lambda: asked(client)) == asked(client)
        """,
    "what the parent left is garbage, and the interpreter ends": """
        import asyncio
        client = new()
        check = in_flight(client)
        sequence = client.unroll()
        parts = sequence.stream(VALUES)
        next(parts)
        loop = asyncio.new_event_loop()
        held = [AsyncClient(ADDRESS, model="m")]
        expected = loop.run_until_complete(held[0].classify([VALUES])).logits.tobytes()
        def collect():
            global client, sequence, parts
            client = sequence = parts = None
            held.clear()
            gc.collect()
            return "collected"
        for leave in (os._exit, sys.exit):
            assert child(collect, leave) == "collected"
            assert child(lambda: "kept", leave) == "kept"
            refused(child(lambda: asyncio.run(held[0].classify([VALUES]))))
            refused(child(lambda: asked(client), leave))
        sequence.close()
        check()
        assert loop.run_until_complete(held[0].classify([VALUES])).logits.tobytes() == expected
        loop.run_until_complete(held[0].close())
        loop.close()
        assert child(lambda: asked(client), sys.exit) == expected
        """,
    "processes of multiprocessing": """
        client = new()
        expected = asked(client)
        def work(_):
            return asked(client) == asked(new()) == expected
        globals()["work"] = work
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(work, range(8)) == [True] * 8
            assert asked(client) == expected
        """,
    "a client of another loop that is closed": """
        import asyncio
        async def once():
            async with AsyncClient(ADDRESS, model="m") as client:
                return (await client.classify([VALUES])).logits.tobytes()
        expected = asyncio.run(once())
        for _ in range(5):
            assert child(lambda: asyncio.run(once())) == expected
            assert child(lambda: asked(new())) == expected
        """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork(address: str, name: str) -> None:
    program = PRELUDE.format(address=address) + dedent(SCRIPTS[name])
    # The stack of a child that crashes is in the output. From Python 3.12 on, a fork beside threads gives a warning.
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
