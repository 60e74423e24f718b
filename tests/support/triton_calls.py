"""All calls with NVIDIA's tritonclient, run in an environment with it and without Unroll.

`python triton_calls.py ADDRESS SEQUENCES.npz ANSWERS.npz` calls the server, and writes its answers as arrays and JSON
under the names of the functions. Only tritonclient, numpy and the standard library are imported.
"""

import asyncio
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found,unused-ignore]  # has an environment of its own
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-not-found,unused-ignore]  # likewise
import tritonclient.grpc.model_config_pb2 as model_config_pb2  # type: ignore[import-not-found,unused-ignore]  # likewise
import tritonclient.grpc.service_pb2 as service_pb2  # type: ignore[import-not-found,unused-ignore]  # likewise
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # type: ignore[import-not-found,unused-ignore]  # likewise

MODEL = "jv"
PATIENCE = 60.0
Arrays = list[Any]
FILES = (service_pb2, model_config_pb2)


def padded(sequences: Arrays, filler: float = np.nan) -> tuple[Any, Any]:
    """Sequences [batch, time, features] with `filler` past their ends, and their lengths."""
    lengths = np.array([len(each) for each in sequences])  # numpy's default, int64
    values = np.full((len(sequences), lengths.max(), sequences[0].shape[1]), filler, np.float32)
    for row, each in zip(values, sequences, strict=True):
        row[: len(each)] = each
    return values, lengths


def tensors(**arrays: Any) -> list[Any]:
    """Makes the raw inputs of a request."""
    inputs = []
    for name, array in arrays.items():
        datatype = np_to_triton_dtype(array.dtype)
        inputs.append(triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))
    return inputs


def wanted(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in names]


def error_of(call: Callable[[], object]) -> list[str]:
    """Returns status and message of a refused call."""
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return ["OK", ""]


class Stream:
    """A stream of the synchronous client."""

    def __init__(self, client: Any, headers: dict[str, str] | None = None) -> None:
        self.client = client
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(callback=lambda result, error: self.answers.put((result, error)), headers=headers)

    def send(self, values: Any, request_id: str, outputs: tuple[str, ...] = ("logits",), **more: Any) -> None:
        self.client.async_stream_infer(
            MODEL, tensors(input=values), outputs=wanted(*outputs), request_id=request_id, **more
        )

    def take(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=PATIENCE)

    def results(self, count: int) -> dict[str, Any]:
        """Returns the next `count` answers by request id; none may be an error."""
        found = {}
        for _ in range(count):
            result, error = self.take()
            if error is not None:
                raise error
            found[result.get_response().id] = result
        return found


def contract(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Number, type and repetition of every field of the client's messages."""
    found: dict[str, Any] = {}
    messages = [each for file in FILES for each in file.DESCRIPTOR.message_types_by_name.values()]
    while messages:
        message = messages.pop()
        messages += message.nested_types
        found[message.full_name] = {
            field.name: [field.number, field.type, field.is_repeated] for field in message.fields
        }
    return found


def described(client: Any, sequences: Arrays) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "version_ready": client.is_model_ready(MODEL, "1"),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata(MODEL, as_json=True),
        "config": client.get_model_config(MODEL, as_json=True)["config"],
        "index": client.get_model_repository_index(as_json=True),
        "load": error_of(lambda: client.load_model(MODEL)),
        "unload": error_of(lambda: client.unload_model(MODEL)),
        "shared_memory": error_of(client.get_system_shared_memory_status),
    }


def ragged(client: Any, sequences: Arrays) -> dict[str, Any]:
    values, lengths = padded(sequences)
    names = ("states", "final_state", "probabilities", "logits")
    result = client.infer(
        MODEL, tensors(input=values, lengths=lengths), outputs=wanted(*names), request_id="r1", model_version="1"
    )
    response = result.get_response()
    return {name: result.as_numpy(name) for name in names} | {
        "meta": {
            "id": response.id,
            "version": response.model_version,
            "outputs": [[each.name, each.datatype, list(each.shape)] for each in response.outputs],
        }
    }


def default_outputs(client: Any, sequences: Arrays) -> dict[str, Any]:
    result = client.infer(MODEL, tensors(input=sequences[0][np.newaxis]))
    names = [each.name for each in result.get_response().outputs]
    return {"names": names, "logits": result.as_numpy("logits"), "probabilities": result.as_numpy("probabilities")}


def resumed(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Splits the batch in time and resumes the second half from the final states of the first."""
    cut = 3
    first = client.infer(
        MODEL, tensors(input=np.stack([each[:cut] for each in sequences])), outputs=wanted("final_state")
    )
    values, lengths = padded([each[cut:] for each in sequences])
    state = np.ascontiguousarray(first.as_numpy("final_state"))
    second = client.infer(
        MODEL, tensors(input=values, lengths=lengths, initial_state=state), outputs=wanted("logits", "final_state")
    )
    return {"logits": second.as_numpy("logits"), "final_state": second.as_numpy("final_state")}


def classification(client: Any, sequences: Arrays) -> dict[str, Any]:
    values, lengths = padded(sequences)
    outputs = [triton.InferRequestedOutput("probabilities", class_count=3)]
    result = client.infer(MODEL, tensors(input=values, lengths=lengths), outputs=outputs)
    classes = result.as_numpy("probabilities")
    every = client.infer(
        MODEL, tensors(input=values, lengths=lengths), outputs=[triton.InferRequestedOutput("logits", class_count=99)]
    )
    return {
        "classes": [[text.decode() for text in row] for row in classes.tolist()],
        "all": list(every.as_numpy("logits").shape),
    }


def callbacks(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Makes concurrent calls by `async_infer`."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for index, each in enumerate(sequences):
        client.async_infer(
            MODEL,
            tensors(input=each[np.newaxis]),
            request_id=str(index),
            callback=lambda result, error: answers.put((result, error)),
        )
    logits = np.zeros((len(sequences), 9), np.float32)
    for _ in sequences:
        result, error = answers.get(timeout=PATIENCE)
        if error:
            raise error
        logits[int(result.get_response().id)] = result.as_numpy("logits")[0]
    return {"logits": logits}


def unary_sequences(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Runs two sequences step by step, with a number as id and with the same number as text."""
    found = {}
    for key, name, values in ((41, "number", sequences[0]), ("41", "text", sequences[1])):
        for step in range(len(values)):
            last = step == len(values) - 1
            result = client.infer(
                MODEL,
                tensors(input=values[np.newaxis, step : step + 1]),
                sequence_id=key,
                sequence_start=step == 0,
                sequence_end=last,
            )
        found[name] = result.as_numpy("logits")
    found["ended"] = error_of(lambda: client.infer(MODEL, tensors(input=values[np.newaxis]), sequence_id="41"))
    return found


def stream_sequences(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Interleaves many sequences on one stream without waiting: single steps, chunks, restarts."""
    stream = Stream(client)
    chunk_of = [1, 2, 3, 5]
    sent = 0
    longest = max(map(len, sequences))
    # A repeated start: earlier steps must have no effect.
    for index, each in enumerate(sequences):
        stream.send(each[np.newaxis, :2] * 3, f"{index}/x", sequence_id=f"s{index}", sequence_start=True)
        sent += 1
    for begin in range(longest):
        for index, each in enumerate(sequences):
            chunk = chunk_of[index % len(chunk_of)]
            if begin % chunk == 0 and begin < len(each):
                end = min(begin + chunk, len(each))
                stream.send(
                    each[np.newaxis, begin:end],
                    f"{index}/{begin}",
                    ("logits", "states"),
                    sequence_id=f"s{index}",
                    sequence_start=begin == 0,
                    sequence_end=end == len(each),
                )
                sent += 1
    results = stream.results(sent)
    client.stop_stream()
    found: dict[str, Any] = {}
    for index in range(len(sequences)):
        begins = sorted(int(name.split("/")[1]) for name in results if name.startswith(f"{index}/") and "x" not in name)
        found[f"logits{index}"] = results[f"{index}/{begins[-1]}"].as_numpy("logits")
        found[f"states{index}"] = np.concatenate(
            [results[f"{index}/{begin}"].as_numpy("states")[0] for begin in begins]
        )
    return found


def across_streams(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Begins a sequence on one stream, continues it by a call, and ends it on another stream."""
    values = sequences[2][np.newaxis]
    stream = Stream(client)
    stream.send(values[:, :3], "a", sequence_id=7, sequence_start=True)
    stream.results(1)
    client.stop_stream()
    client.infer(MODEL, tensors(input=values[:, 3:5]), sequence_id=7)
    stream = Stream(client)
    stream.send(values[:, 5:], "b", ("logits", "final_state"), sequence_id=7, sequence_end=True)
    result = stream.results(1)["b"]
    client.stop_stream()
    return {"logits": result.as_numpy("logits"), "final_state": result.as_numpy("final_state")}


def stream_errors(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Sends refused requests between valid ones on one stream, which continues."""
    values = sequences[0][np.newaxis]
    stream = Stream(client)
    stream.send(values, "good", outputs=("logits",))
    stream.send(values, "no start", sequence_id=99)
    stream.send(values[:, :, :5], "features")
    stream.send(values, "output", outputs=("nothing",))
    stream.send(values, "empty", enable_empty_final_response=True, priority=1, timeout=30_000_000)
    messages: list[str] = []
    logits, final = [], []
    for _ in range(5):
        result, error = stream.take()
        if error is None:
            logits.append(result.as_numpy("logits"))
            response = result.get_response()
            final.append([response.id, response.parameters["triton_final_response"].bool_param])
        else:
            messages.append(error.message())
    client.stop_stream()
    return {"logits": np.concatenate(logits), "errors": messages, "final": final}


def stream_status(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Opens a stream that ends with the status of its first error."""
    values = sequences[0][np.newaxis]
    stream = Stream(client, headers={"triton_grpc_error": "true"})
    stream.send(values, "good", outputs=("logits",))
    good, _ = stream.take()
    stream.send(values, "no start", sequence_id=99)
    _, error = stream.take()
    client.stop_stream()
    return {
        "logits": good.as_numpy("logits"),
        "error": [str(error.status()), error.message()],
        "int32": client.infer(MODEL, tensors(input=values, lengths=np.array([values.shape[1]], np.int32))).as_numpy(
            "logits"
        ),
    }


def errors(client: Any, sequences: Arrays) -> dict[str, Any]:
    values, lengths = padded(sequences[:2], 0.0)
    good = {"input": values, "lengths": lengths}
    not_finite = values.copy()
    not_finite[1, 0, 3] = np.inf

    def refused(outputs: list[Any] | None = None, model: str = MODEL, **inputs: Any) -> list[str]:
        options = {key: inputs.pop(key) for key in list(inputs) if key in ("model_version", "parameters", "timeout")}
        return error_of(lambda: client.infer(model, tensors(**inputs), outputs=outputs, **options))

    shared = triton.InferInput("input", [1, 2, 12], "FP32")
    shared.set_shared_memory("region", 96)
    return {
        "model": refused(model="nothing", **good),
        "version": refused(model_version="7", **good),
        "no version": refused(model_version="x", **good),
        "input": refused(input=values, nothing=values),
        "missing": refused(lengths=lengths),
        "type": refused(input=lengths),
        "rank": refused(input=values[0]),
        "features": refused(input=values[:, :, :5].copy()),
        "lengths": refused(input=values, lengths=lengths + 99),
        "length 0": refused(input=values, lengths=lengths * 0),
        "batches": refused(input=values, lengths=lengths[:1]),
        "not finite": refused(input=not_finite, lengths=lengths),
        "state": refused(initial_state=np.zeros((2, 1, 5), np.float32), **good),
        "output": refused(wanted("nothing"), **good),
        "twice": refused(wanted("logits", "logits"), **good),
        "parameter": refused(parameters={"mode": "fast"}, **good),
        "shared memory": error_of(lambda: client.infer(MODEL, [shared])),
        "states have no classes": refused([triton.InferRequestedOutput("states", class_count=2)], **good),
        "metadata": error_of(lambda: client.get_model_metadata("nothing")),
    }


def cancelled(client: Any, sequences: Arrays) -> dict[str, Any]:
    """Cancels a call and a stream; the server still answers others."""
    big = np.zeros((8, 40000, 12), np.float32)
    done = threading.Event()
    found: dict[str, Any] = {}

    def callback(result: Any, error: Any) -> None:
        found["call"] = str(error.status()) if error else "OK"
        done.set()

    handle = client.async_infer(MODEL, tensors(input=big), callback=callback)
    handle.cancel()
    done.wait(PATIENCE)
    stream = Stream(client)
    stream.send(big[:1], "big")
    client.stop_stream(cancel_requests=True)
    _, error = stream.take()
    found["stream"] = str(error.status()) if error else "OK"
    found["timeout"] = error_of(lambda: client.infer(MODEL, tensors(input=big), client_timeout=0.05))
    found["server timeout"] = error_of(lambda: client.infer(MODEL, tensors(input=big), timeout=1000))
    found["logits"] = client.infer(MODEL, tensors(input=sequences[0][np.newaxis])).as_numpy("logits")
    return found


def statistics(client: Any, sequences: Arrays) -> dict[str, Any]:
    before = client.get_inference_statistics(MODEL, as_json=True)["model_stats"][0]
    values, lengths = padded(sequences)
    client.infer(MODEL, tensors(input=values, lengths=lengths))
    error_of(lambda: client.infer(MODEL, tensors(input=values[:, :, :1].copy())))
    return {"before": before, "after": client.get_inference_statistics(as_json=True)["model_stats"][0]}


async def with_asyncio(address: str, sequences: Arrays) -> dict[str, Any]:
    async with triton_aio.InferenceServerClient(address) as client:
        answers = await asyncio.gather(
            *(client.infer(MODEL, tensors(input=each[np.newaxis])) for each in sequences),
        )

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for begin in range(0, max(map(len, sequences)), 4):
                for index, each in enumerate(sequences):
                    if begin < len(each):
                        yield {
                            "model_name": MODEL,
                            "inputs": tensors(input=each[np.newaxis, begin : begin + 4]),
                            "request_id": str(index),
                            "sequence_id": 1000 + index,
                            "sequence_start": begin == 0,
                            "sequence_end": begin + 4 >= len(each),
                        }

        last: dict[int, Any] = {}
        async for result, error in client.stream_infer(requests()):
            if error:
                raise error
            last[int(result.get_response().id)] = result.as_numpy("logits")
        return {
            "ready": await client.is_model_ready(MODEL),
            "logits": np.concatenate([answer.as_numpy("logits") for answer in answers]),
            "streamed": np.concatenate([last[index] for index in range(len(sequences))]),
        }


SCENARIOS = [
    contract,
    described,
    ragged,
    default_outputs,
    resumed,
    classification,
    callbacks,
    unary_sequences,
    stream_sequences,
    across_streams,
    stream_errors,
    stream_status,
    errors,
    cancelled,
    statistics,
]


def main(address: str, given: str, answers: str) -> None:
    """Runs every scenario; records a failure as its answer."""
    with np.load(given) as file:
        sequences = [file[f"s{index}"] for index in range(len(file.files))]
    found: dict[str, Any] = {}
    with triton.InferenceServerClient(address) as client:
        for scenario in SCENARIOS:
            found[scenario.__name__] = scenario(client, sequences)
    found["with_asyncio"] = asyncio.run(with_asyncio(address, sequences))
    arrays: dict[str, Any] = {
        f"{scenario}/{name}": value
        for scenario, values in found.items()
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
    facts = {
        scenario: {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
        for scenario, values in found.items()
    }
    np.savez(answers, facts=json.dumps(facts), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
