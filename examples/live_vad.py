"""`make demo-vad`: serves silero-vad as published to live 16 kHz streams, and kills the server in the middle.

The file is from the wheel on PyPI, imported unchanged. Every frame is compared bit by bit with silero's own loop. The
number of streams that a core sustains is measured beside silero's own wrapper, which has one session per stream.
"""

import argparse
import asyncio
import importlib.metadata
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from unroll_bench.load.streams import stream_loop
from unroll_client import AsyncClient, AsyncSequence, Snapshot

Float32Array = NDArray[np.float32]

BIN = Path(sys.executable).parent
RATE, CHUNK = 16000, 512
FRAME = CHUNK / RATE
"""Duration of a chunk in seconds: 32 ms."""
VOICES = 32
"""Number of distinct audio streams; the other streams repeat them at other times."""
LADDER = (50, 100, 200, 300, 400, 500, 600, 800, 1000)
"""Numbers of paced streams to try."""
WARM_UP = 0.5
"""Seconds of paced streams before each measurement."""
IDLE = 2000
"""Number of open streams for the measurement of memory."""

console = Console(highlight=False, width=110)


def main() -> None:
    """Runs the demo; exits with 1 if a frame differs from silero's own loop."""
    parser = argparse.ArgumentParser(description="Serves silero-vad to live streams, and kills the server.")
    parser.add_argument("--streams", type=int, default=1000, help="live streams while the server is killed")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of audio in these streams")
    parser.add_argument("--measure", type=float, default=3.0, help="seconds per measurement; 0: no measurements")
    options = parser.parse_args()
    published = published_file()
    with tempfile.TemporaryDirectory(prefix="demo-vad-") as folder:
        models = Path(folder) / "models"
        console.rule("1. Import silero_vad.onnx as it is on PyPI")
        command("unroll-export", "inspect", published)
        flags = ["--set", "sr=16000", "--context", "input:64", "--chunk", str(CHUNK)]
        command("unroll-export", "import", published, *flags, "--out", models / "vad")
        command("unroll-export", "import", published, *flags, "--form", "matmul", "--out", models / "vad-matmul")
        console.rule(f"2. {options.streams} live streams, one chunk every 32 ms each; the server is killed")
        frames = max(6, round(options.seconds / FRAME))
        voices = speech(VOICES, frames)
        differing = asyncio.run(survive(models, voices, options.streams, published))
        if options.measure:
            console.rule("3. Streams that one core sustains")
            measure(models, voices, published, options.measure)
    sys.exit(1 if differing else 0)


def published_file() -> Path:
    """Returns the path of the graph in the installed wheel."""
    try:
        files = importlib.metadata.files("silero-vad") or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit("silero-vad is not installed: pip install --no-deps silero-vad")
    return Path(str(next(file for file in files if file.name == "silero_vad.onnx").locate()))


def speech(voices: int, frames: int) -> Float32Array:
    """Returns voiced sounds with pauses and noise that the model is unsure of, float32 [voices, frames, 512]."""
    rng = np.random.default_rng(0)
    seconds = np.arange(frames * CHUNK) / RATE
    pitch = rng.uniform(80, 260, (voices, 1)) * (
        1 + 0.05 * np.sin(2 * np.pi * rng.uniform(2, 5, (voices, 1)) * seconds)
    )
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / RATE
    voice = np.sum([np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12)], axis=0)
    loudness = np.clip(np.sin(2 * np.pi * rng.uniform(0.5, 3, (voices, 1)) * seconds), 0, 1)
    audio = (0.1 * voice * loudness + 0.01 * rng.standard_normal(voice.shape)).astype(np.float32)
    return np.asarray(audio.reshape(voices, frames, CHUNK), np.float32)


def own_loop(published: Path, chunks: Float32Array) -> Float32Array:
    """Computes the frames of one stream, [frames, 512], as silero's own OnnxWrapper does."""
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(published, options, providers=["CPUExecutionProvider"])
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    found = []
    for chunk in chunks:
        values = np.concatenate([context, chunk[np.newaxis]], axis=1)
        probability, state = session.run(None, {"input": values, "state": state, "sr": np.array(RATE, np.int64)})
        context = values[:, -64:]
        found.append(probability[0, 0])
    return np.array(found, np.float32)


def command(name: str, *arguments: str | Path) -> None:
    """Runs an installed command; ends the demo if it fails."""
    console.print("$", name, *arguments, soft_wrap=True)
    done = subprocess.run([BIN / name, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def serving(models: Path, core: int | None = None) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Runs a server on a free port, on one core if given; yields its address and its process."""
    arguments = ["--models", str(models), "--listen", "127.0.0.1:0", "--log-level", "error"]
    with subprocess.Popen([BIN / "unroll-serve", *arguments], stdout=subprocess.PIPE, text=True) as process:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        announcement = process.stdout.readline().strip()
        if not announcement:
            sys.exit(process.wait())
        try:
            yield announcement.split(" on ")[1].split()[0], process
        finally:
            process.terminate()
            process.wait()


async def survive(models: Path, voices: Float32Array, streams: int, published: Path) -> int:
    """Streams audio, kills the server half-way, and returns the number of frames that differ from silero's own loop."""
    frames = voices.shape[1]
    with serving(models) as (first, doomed), serving(models) as (second, _):
        async with AsyncClient([first, second]) as client:
            sequences = [client.unroll("vad") for _ in range(streams)]
            await asyncio.gather(*[sequence.open() for sequence in sequences])
            begin = time.perf_counter()

            async def live(index: int, sequence: AsyncSequence) -> Float32Array:
                """Sends a chunk at each tick of the stream's clock, and returns the outputs of its frames."""
                found = []
                for frame, chunk in enumerate(voices[index % VOICES]):
                    due = begin + (frame + index / streams) * FRAME
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    steps = await sequence.send(chunk[np.newaxis])
                    found.append(steps.outputs["output"][0, 0])
                return np.array(found, np.float32)

            async def kill() -> None:
                await asyncio.sleep(frames / 2 * FRAME)
                doomed.kill()
                console.print(f"server {first} is killed; every stream continues from its snapshot on {second}")

            killing = asyncio.create_task(kill())
            found = await asyncio.gather(*[live(*each) for each in enumerate(sequences)])
            await killing
            took = time.perf_counter() - begin
            snapshot: Snapshot = await sequences[0].snapshot()
    known = [own_loop(published, chunks) for chunks in voices]
    pairs = [(own, known[index % VOICES]) for index, own in enumerate(found)]
    differing = sum(int((own.view(np.uint32) != expected.view(np.uint32)).sum()) for own, expected in pairs)
    console.print(
        f"{streams * frames:,} frames, {frames * FRAME:.1f} s of audio per stream, in {took:.1f} s\n"
        f"frames whose bits differ from silero's own loop: {differing}\n"
        f"state of a stream: {sum(map(len, snapshot.data)):,} bytes"
    )
    return differing


def measure(models: Path, voices: Float32Array, published: Path, seconds: float) -> None:
    """Measures how many paced streams one core sustains, beside silero's own wrapper."""
    cores = sorted(os.sched_getaffinity(0))
    table = Table("runtime", "CPU per frame", "streams per core, by CPU", "paced, p99 under 32 ms", "memory per stream")
    memory = f"{asyncio.run(memory_of_a_stream(models)) / 1024:.1f} KiB"
    for model, what in (("vad", "Unroll, the file as published"), ("vad-matmul", "Unroll, its form of products")):
        held, latency, spent = 0, 0.0, float("inf")
        with serving(models, cores[0]) as (address, process):
            os.sched_setaffinity(0, set(cores[1:]) or {cores[0]})
            for streams in LADDER:
                # Twice, in case another process used the core.
                before = cpu_seconds(process.pid)
                p99 = min(paced(address, model, streams, voices[0], seconds) for _ in range(2))
                frames = 2 * streams * (seconds + WARM_UP) / FRAME
                spent = min(spent, (cpu_seconds(process.pid) - before) / frames)
                console.print(f"  {model}, {streams} streams: p99 {p99 * 1e3:.1f} ms")
                if p99 >= FRAME:
                    break
                held, latency = streams, p99
            os.sched_setaffinity(0, cores)
        paced_text = f"{held} ({latency * 1e3:.1f} ms)" if held else "none: the core was not free"
        table.add_row(what, f"{spent * 1e6:.0f} us", f"{FRAME / spent:.0f}", paced_text, memory)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        alone, many, each = pool.apply(wrapper, (str(published), 100, cores[0]))
    rows = (("one stream alone", alone, ""), ("100 streams", many, f"{each / 2**20:.1f} MiB"))
    for what, took, taken in rows:
        table.add_row(f"silero's wrapper, {what}", f"{took * 1e6:.0f} us", f"{FRAME / took:.0f}", "", taken)
    console.print(table)


def paced(address: str, model: str, streams: int, voice: Float32Array, seconds: float) -> float:
    """Returns the 99th percentile of a frame's latency in seconds; infinite if a chunk was not answered."""
    run = stream_loop(
        address,
        sequences=streams,
        streams=4,
        cadence=FRAME,
        chunk_steps=1,
        seconds=seconds,
        warm_up=WARM_UP,
        model=model,
        values=voice,
    )
    result = asyncio.run(run)
    return float("inf") if result.errors else float(np.quantile(result.latencies, 0.99))


async def memory_of_a_stream(models: Path) -> float:
    """Returns the memory of an open stream in a server after its first chunk, in bytes."""
    with serving(models) as (address, process):
        async with AsyncClient(address) as client:
            sequences = [client.unroll("vad") for _ in range(2 * IDLE)]
            taken = []
            for half in (sequences[:IDLE], sequences[IDLE:]):
                for some in range(0, IDLE, 100):
                    await asyncio.gather(*[each.send(np.zeros((1, CHUNK))) for each in half[some : some + 100]])
                taken.append(resident(process.pid))
            return (taken[1] - taken[0]) / IDLE


def wrapper(published: str, count: int, core: int) -> tuple[float, float, float]:
    """Measures silero's own wrapper: CPU seconds per frame of one stream and of `count`, and bytes per stream."""
    os.sched_setaffinity(0, {core})
    import torch
    from silero_vad.utils_vad import OnnxWrapper

    torch.set_num_threads(1)
    chunk = torch.randn(1, CHUNK) * 0.1

    def timed(wrappers: list[OnnxWrapper], rounds: int) -> float:
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            for each in wrappers:
                each(chunk, RATE)
            times.append((time.process_time() - begin) / len(wrappers))
        return statistics.median(times)

    first = OnnxWrapper(published, True)
    alone = timed([first], 200)
    before = resident(os.getpid())
    wrappers = [OnnxWrapper(published, True) for _ in range(count)]
    many = timed(wrappers, 7)
    return alone, many, (resident(os.getpid()) - before) / count


def cpu_seconds(pid: int) -> float:
    """Returns the seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
