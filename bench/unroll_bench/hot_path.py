"""Counts the Python calls of one Classify in a real server, and the files that they cross.

`python -m unroll_bench.hot_path MODELS [options of unroll-serve]` serves MODELS, a repository with one model,
classifies one sequence at a time, and prints each call of one request, and the median of both counts. Only the event
loop's thread and only Unroll's functions count.
"""

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from unroll_bench.contest.processes import Server
from unroll_client import AsyncClient

REQUESTS = 50
STEPS = 29

SERVE = """
import json, os, sys

calls, leave = [], os._exit

def profile(frame, event, argument):
    if event == "call":
        name = frame.f_code.co_filename
        at = name.rfind("/unroll_")
        if at >= 0 and "/unroll_proto/" not in name:
            calls.append((name[at + 1 :], frame.f_code.co_qualname))

def write(code):
    sys.setprofile(None)
    with open(os.environ["HOT_PATH"], "w") as file:
        json.dump(calls, file)
    leave(code)

os._exit = write  # how the server ends
sys.setprofile(profile)
from unroll_server.__main__ import main
main()
"""


async def recorded(models: Path, options: list[str]) -> list[tuple[str, str]]:
    """Serves, asks REQUESTS times, and returns file and name of every call in the server, in order."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "calls.json"
        serve: list[str | Path] = [sys.executable, "-c", SERVE, "--models", models, "--listen", "127.0.0.1:0", *options]
        core = max(os.sched_getaffinity(0))
        server = await Server.start(serve, core, Path(folder) / "log", env={"HOT_PATH": str(found)})
        try:
            async with AsyncClient(server.address) as client:
                (model,) = await client.models()
                values = np.random.default_rng(0).standard_normal((STEPS, model.input_size))
                for _ in range(REQUESTS):
                    await client.classify([values], model=model.name)
        finally:
            await server.stop()
        return [tuple(call) for call in json.loads(found.read_text())]


def main() -> None:
    """Prints the calls of one request, and the medians of all."""
    calls = asyncio.run(recorded(Path(sys.argv[1]), sys.argv[2:]))
    handler = [place for place, (_, name) in enumerate(calls) if name == "UnrollService.Classify"]
    # Each request is entered once, and resumed as often as any other.
    begins = handler[:: len(handler) // REQUESTS]
    requests = [calls[begin:end] for begin, end in itertools.pairwise(begins)]
    for file, name in requests[-1]:
        print(f"{file:48} {name}")
    print(f"calls: {statistics.median(map(len, requests)):.0f}")
    print(f"files: {statistics.median(len({file for file, _ in each}) for each in requests):.0f}")


if __name__ == "__main__":
    main()
