"""Metadata and configuration of a model, as the Open Inference Protocol defines them."""

from collections.abc import Sequence
from typing import NamedTuple

from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelSpec
from unroll_proto.inference import model_config_pb2 as config_pb
from unroll_proto.inference import service_pb2 as pb

PLATFORMS = {"kernel": "unroll_kernel", "onnx": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}
"""Triton's names of the runtimes."""
BACKENDS = {"kernel": "unroll", "onnx": "onnxruntime", "torchscript": "pytorch"}


class _Tensor(NamedTuple):
    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


def _inputs(spec: ModelSpec) -> list[_Tensor]:
    return [
        _Tensor("input", "FP32", (-1, -1, spec.input_size)),
        _Tensor("lengths", "INT32", (-1,), optional=True),
        *(_Tensor(f"initial_{name}", "FP32", (-1, *shape), optional=True) for name, shape, *_ in spec.states),
    ]


def _outputs(spec: ModelSpec) -> list[_Tensor]:
    return [
        _Tensor("logits", "FP32", (-1, spec.output_size)),
        _Tensor("probabilities", "FP32", (-1, max(spec.output_size, 2))),
        _Tensor("states", "FP32", (-1, -1, spec.hidden_size)),
        *(_Tensor(f"final_{name}", "FP32", (-1, *shape)) for name, shape, *_ in spec.states),
    ]


def metadata(model: Model, versions: Sequence[int]) -> pb.ModelMetadataResponse:
    """Returns the inputs and outputs of a model.

    Args:
        model: The model.
        versions: Served versions of its name.
    """
    spec = model.spec
    return pb.ModelMetadataResponse(
        name=spec.key.name,
        versions=[str(version) for version in versions],
        platform=PLATFORMS[model.runtime.name],
        inputs=[_metadata(tensor) for tensor in _inputs(spec)],
        outputs=[_metadata(tensor) for tensor in _outputs(spec)],
    )


def _metadata(tensor: _Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def config(model: Model, versions: Sequence[int]) -> config_pb.ModelConfig:
    """Returns the configuration of a model, as Triton defines it.

    `max_batch_size` is 0: the shapes include the batch. Without the batch `lengths` would have no dimension, which
    perf_analyzer can't send. There is no `sequence_batching`: with it, Triton's clients assume that every request
    belongs to a sequence.

    Args:
        model: The model.
        versions: Served versions of its name.
    """
    spec, runtime = model.spec, model.runtime
    kind = config_pb.ModelInstanceGroup
    return config_pb.ModelConfig(
        name=spec.key.name,
        platform=PLATFORMS[runtime.name],
        backend=BACKENDS[runtime.name],
        version_policy=config_pb.ModelVersionPolicy(
            specific=config_pb.ModelVersionPolicy.Specific(versions=versions),
        ),
        input=[
            config_pb.ModelInput(
                name=tensor.name,
                data_type=_type(tensor),
                dims=tensor.shape,
                allow_ragged_batch=tensor.name == "input",
                optional=tensor.optional,
            )
            for tensor in _inputs(spec)
        ],
        output=[
            config_pb.ModelOutput(name=tensor.name, data_type=_type(tensor), dims=tensor.shape)
            for tensor in _outputs(spec)
        ],
        instance_group=[
            kind(name=f"{spec.key.name}_0", count=1, kind=kind.KIND_GPU if runtime.device == "cuda" else kind.KIND_CPU)
        ],
        default_model_filename=runtime.artifact,
        parameters={
            "architecture": config_pb.ModelParameter(string_value=spec.architecture),
            "class_labels": config_pb.ModelParameter(string_value="\n".join(spec.class_labels)),
            "feature_names": config_pb.ModelParameter(string_value="\n".join(spec.feature_names)),
        },
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=False),
    )


def _type(tensor: _Tensor) -> "config_pb.DataType.ValueType":
    return config_pb.DataType.Value(f"TYPE_{tensor.datatype}")
