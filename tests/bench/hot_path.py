"""Counts the Python calls of one Classify in a real server, and the files that they cross.

`PYTHONPATH=tests python -m bench.hot_path MODELS [options of unroll-serve]` serves MODELS, a repository with one
model, classifies one sequence at a time, and prints the median of both counts, and each call of one request. Only the
event loop's thread and only functions of ours count.
"""

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from support.processes import ServerProcess

from unroll_client import Client

REQUESTS = 50
STEPS = 29

SERVE = """
import atexit, json, os, sys

calls = []

def profile(frame, event, argument):
    if event == "call":
        name = frame.f_code.co_filename
        at = name.rfind("/unroll_")
        if at >= 0 and "/unroll_proto/" not in name:
            calls.append((name[at + 1 :], frame.f_code.co_qualname))

def write():
    sys.setprofile(None)
    with open(os.environ["HOT_PATH"], "w") as file:
        json.dump(calls, file)

atexit.register(write)
sys.setprofile(profile)
from unroll_server.__main__ import main
main()
"""


def main() -> None:
    """Serves, asks, and prints."""
    models, options = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        found, executables = Path(folder) / "calls.json", Path(folder) / "bin"
        executables.mkdir()
        serve = executables / "unroll-serve"
        serve.write_text(f"#!{sys.executable}\n{SERVE}")
        serve.chmod(0o755)
        with ServerProcess(
            models, Path(folder) / "log", *options, env={"HOT_PATH": str(found)}, executables=executables
        ) as server:
            with Client(server.address) as client:
                (model,) = client.models()
                values = np.random.default_rng(0).standard_normal((STEPS, model.input_size))
                for _ in range(REQUESTS):
                    client.classify([values], model=model.name)
            server.stop()
        calls = [tuple(call) for call in json.loads(found.read_text())]
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
