"""Triton with a Python-backend model and dynamic batching, out of the wheel of nvidia-pytriton.

`python -m unroll_bench.contest.servers.triton ENVIRONMENT GRAPH`: ENVIRONMENT is a virtual environment with
nvidia-pytriton and onnxruntime, GRAPH the model.onnx. Runs until SIGTERM or SIGINT.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import grpc.aio

from unroll_bench.contest.contestants import CLASSES, FEATURES, MODEL
from unroll_proto.inference import service_pb2 as oip

MODEL_READY = "/inference.GRPCInferenceService/ModelReady"
CONFIG = """
name: "{model}"
backend: "python"
max_batch_size: 64
input [
  {{ name: "input", data_type: TYPE_FP32, dims: [-1, {features}], allow_ragged_batch: true }},
  {{ name: "lengths", data_type: TYPE_INT32, dims: [1] }}
]
output [ {{ name: "logits", data_type: TYPE_FP32, dims: [{classes}] }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
parameters {{ key: "graph" value: {{ string_value: "{graph}" }} }}
"""
DELAY = 0
"""Microseconds that the batcher waits for more requests; 0 was best with 1 and with 64 in flight."""


def write_repository(root: Path, graph: Path) -> None:
    """Writes Triton's model repository of the one model."""
    version = root / MODEL / "1"
    version.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    config = CONFIG.format(model=MODEL, features=FEATURES, classes=CLASSES, delay=DELAY, graph=graph)
    (root / MODEL / "config.pbtxt").write_text(config)


def write_backend(root: Path, triton: Path, python: str) -> None:
    """Writes the folder of backends: Triton's Python backend with the stub of the environment's Python."""
    shutil.copytree(triton / "backends" / "python", root / "python")
    shutil.copy(triton / "python_backend_stubs" / python / "triton_python_backend_stub", root / "python")


async def ready(address: str) -> None:
    """Waits until the model answers."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(MODEL_READY)
        request = oip.ModelReadyRequest(name=MODEL).SerializeToString()
        while True:
            try:
                if await call(request, wait_for_ready=True):  # a message of one false field is empty
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.1)


async def run(environment: Path, graph: Path) -> None:
    """Starts Triton, prints its address, and ends it on a signal."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    site = next((environment / "lib").glob("python3.*")) / "site-packages"
    triton = site / "pytriton" / "tritonserver"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="unroll-bench-triton-") as folder:
        repository, backends = Path(folder, "models"), Path(folder, "backends")
        write_repository(repository, graph)
        write_backend(backends, triton, site.parent.name.removeprefix("python"))
        process = await asyncio.create_subprocess_exec(
            triton / "bin" / "tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={address.rpartition(':')[2]}",
            "--log-info=false",
            stdout=sys.stderr,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
                "PYTHONPATH": str(site),
                "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            },
        )
        ended, up, asked = (asyncio.ensure_future(task) for task in (process.wait(), ready(address), stop.wait()))
        await asyncio.wait({ended, up, asked}, return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            print(f"serving triton on {address}", flush=True)
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (up, asked):
            task.cancel()
        if not ended.done():
            process.terminate()
            await ended


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2]).absolute()))
