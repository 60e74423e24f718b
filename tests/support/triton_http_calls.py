"""Calls with NVIDIA's tritonclient over HTTP, run in an environment with it and without Unroll.

`python triton_http_calls.py HOST:PORT SEQUENCES.npz ANSWERS.npz` calls a web process, and writes its answers as arrays
and JSON under the names of the calls.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton  # type: ignore[import-not-found,unused-ignore]  # has an environment of its own
import tritonclient.http.aio as triton_aio  # type: ignore[import-not-found,unused-ignore]  # likewise
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found,unused-ignore]  # likewise

MODEL = "jv"


def tensor(name: str, array: Any, datatype: str = "FP32", binary: bool = True) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=binary)


def batch(sequences: list[Any], binary: bool = True) -> list[Any]:
    """Makes the inputs of a padded batch."""
    lengths = np.array([len(each) for each in sequences], np.int64)
    values = np.zeros((len(sequences), lengths.max(), sequences[0].shape[1]), np.float32)
    for row, each in zip(values, sequences, strict=True):
        row[: len(each)] = each
    return [tensor("input", values, binary=binary), tensor("lengths", lengths, "INT64", binary)]


def error_of(call: Callable[[], object]) -> list[str]:
    """Returns status and message of a refused call."""
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return ["200", ""]


def described(client: Any) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "version_ready": client.is_model_ready(MODEL, "1"),
        "other_ready": client.is_model_ready("nothing"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata(MODEL),
        "config": client.get_model_config(MODEL, "1"),
        "index": client.get_model_repository_index(),
        "statistics": [client.get_inference_statistics(name) for name in (MODEL, "")],
    }


def errors(client: Any, sequences: list[Any]) -> dict[str, list[str]]:
    inputs = batch(sequences[:1])
    narrow = np.zeros((1, 3, 5), np.float32)
    return {
        "model": error_of(lambda: client.infer("nothing", inputs)),
        "version": error_of(lambda: client.infer(MODEL, inputs, model_version="7")),
        "features": error_of(lambda: client.infer(MODEL, [tensor("input", narrow)])),
        "output": error_of(lambda: client.infer(MODEL, inputs, outputs=[triton.InferRequestedOutput("nothing")])),
        "metadata": error_of(lambda: client.get_model_metadata("nothing")),
        "load": error_of(lambda: client.load_model(MODEL)),
        "shared memory": error_of(client.get_system_shared_memory_status),
    }


def inferred(client: Any, sequences: list[Any]) -> dict[str, Any]:
    """Returns logits [sequences, classes] by the way in which they were asked for."""
    found = {}
    for name, binary, options in (
        ("binary", True, {}),
        ("json", False, {}),
        ("gzip", True, {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}),
        ("deflate", False, {"request_compression_algorithm": "deflate", "response_compression_algorithm": "deflate"}),
    ):
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
        result = client.infer(MODEL, batch(sequences, binary), outputs=outputs, request_id=name, **options)
        assert result.get_response()["id"] == name
        found[name] = result.as_numpy("logits")
    found["default"] = client.infer(MODEL, batch(sequences)).as_numpy("logits")
    calls = [client.async_infer(MODEL, batch([each])) for each in sequences]
    found["async"] = np.concatenate([call.get_result().as_numpy("logits") for call in calls])
    rows = []
    for number, each in enumerate(sequences, 1):
        client.infer(MODEL, [tensor("input", each[np.newaxis, :3])], sequence_id=number, sequence_start=True)
        end = client.infer(MODEL, [tensor("input", each[np.newaxis, 3:])], sequence_id=number, sequence_end=True)
        rows.append(end.as_numpy("logits"))
    found["sequences"] = np.concatenate(rows)
    classes = client.infer(MODEL, batch(sequences), outputs=[triton.InferRequestedOutput("logits", class_count=1)])
    found["classes"] = np.array([text.decode() for text in classes.as_numpy("logits").ravel()])
    return found


async def with_asyncio(address: str, sequences: list[Any]) -> Any:
    async with triton_aio.InferenceServerClient(address) as client:
        results = await asyncio.gather(*(client.infer(MODEL, batch([each])) for each in sequences))
    return np.concatenate([result.as_numpy("logits") for result in results])


def main() -> None:
    address, given, answers = sys.argv[1:]
    with np.load(given) as content:
        sequences = [content[f"s{index}"] for index in range(len(content.files))]
    with triton.InferenceServerClient(address, concurrency=4) as client:
        arrays = inferred(client, sequences)
        facts = {"described": described(client), "errors": errors(client, sequences)}
    arrays["asyncio"] = asyncio.run(with_asyncio(address, sequences))
    np.savez(answers, facts=json.dumps(facts), **arrays)


if __name__ == "__main__":
    main()
