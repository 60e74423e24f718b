"""Metadata and configuration of a model, as the Open Inference Protocol defines them."""

from collections.abc import Sequence

from unroll_engine.models.loader import Model
from unroll_proto.inference import model_config_pb2 as config_pb
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.oip.signature import OPEN, Described, inputs_of, outputs_of

PLATFORMS = {"kernel": "unroll_kernel", "onnx": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}
"""Triton's names of the runtimes."""
BACKENDS = {"kernel": "unroll", "onnx": "onnxruntime", "torchscript": "pytorch"}


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
        inputs=[_metadata(tensor) for tensor in inputs_of(spec)],
        outputs=[_metadata(tensor) for tensor in outputs_of(spec)],
    )


def _metadata(tensor: Described) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatypes[0], shape=tensor.shape)


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
                allow_ragged_batch=tensor.shape[:2] == (OPEN, OPEN),
                optional=tensor.optional,
            )
            for tensor in inputs_of(spec)
        ],
        output=[
            config_pb.ModelOutput(name=tensor.name, data_type=_type(tensor), dims=tensor.shape)
            for tensor in outputs_of(spec)
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


def _type(tensor: Described) -> "config_pb.DataType.ValueType":
    return config_pb.DataType.Value(f"TYPE_{tensor.datatypes[0]}")
