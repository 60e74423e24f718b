"""Weights of a served model, from its bundle in a folder of this machine."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from unroll_client import ModelInfo
from unroll_proto.bundle import BundleError, artifact_of, check_name, fingerprint, read_artifact, read_manifest
from unroll_proto.onnx import onnx_pb2
from unroll_proto.v1 import bundle_pb2 as pb
from unroll_web.page.frames import Float32Array
from unroll_web.page.network import Layer, Network

MOST_WEIGHTS_BYTES = 2**28


class WeightsUnavailableError(Exception):
    """The page can't have the weights; the message is the reason and what to do."""


def network_of(models: Path | None, model: ModelInfo, bundle: bytes) -> Network:
    """Returns the network of a served model.

    Args:
        models: The model repository; None if the command was given none.
        model: The model version.
        bundle: The fingerprint that the server reports.

    Raises:
        WeightsUnavailableError: there is no repository, the model is a step model, or the bundle is another one.
    """
    if model.architecture == "step":
        raise WeightsUnavailableError(f"{model.name} is an imported ONNX graph: it has no layers of weights to show.")
    if models is None:
        raise WeightsUnavailableError(
            "The weights are on the server. Start the page with the server's model repository to see the arithmetic:"
            " unroll web --models DIR"
        )
    try:
        check_name(model.name)
        return _load(models / model.name / str(model.version), bundle)
    except (BundleError, OSError, ValueError, KeyError) as error:
        raise WeightsUnavailableError(f"--models: {error}") from None


@lru_cache(maxsize=8)
def _load(path: Path, bundle: bytes) -> Network:
    manifest = read_manifest(path)
    found = fingerprint(manifest)
    if bundle and found != bundle:
        raise BundleError(f"{path}: is another bundle ({found.hex()}) than the server's ({bundle.hex()})")
    artifact = artifact_of(manifest, pb.ARTIFACT_KIND_WEIGHTS)
    if artifact.size_bytes > MOST_WEIGHTS_BYTES:
        raise BundleError(f"{path}: {artifact.size_bytes} bytes of weights, {MOST_WEIGHTS_BYTES} at most for the page")
    tensors = _read_safetensors(read_artifact(path, artifact))
    cell = manifest.architecture.removeprefix("simple_")
    if cell == "rnn":
        graph = read_artifact(path, artifact_of(manifest, pb.ARTIFACT_KIND_ONNX_RNN))
        cell = _nonlinearity(onnx_pb2.ModelProto.FromString(graph))
    layers = [
        Layer(*(tensors[f"rnn.{name}_l{index}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
        for index in range(manifest.num_layers)
    ]
    return Network(cell, tensors["mean"], tensors["std"], tuple(layers), tensors["fc.weight"], tensors["fc.bias"])


def _read_safetensors(content: bytes) -> dict[str, Float32Array]:
    """Reads float32 tensors: 8 bytes of length, a JSON header with dtype, shape and place of each, the data."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name}: float32 expected, got {entry['dtype']}")
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(content[begin + first : begin + last], "<f4").reshape(entry["shape"])
    return tensors


def _nonlinearity(model: onnx_pb2.ModelProto) -> str:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "RNN" and attribute.name == "activations":
                return attribute.strings[0].decode().lower()
    return "tanh"
