"""unroll.v1.Model: the description of a served model."""

from unroll_engine.models.loader import Model
from unroll_engine.models.spec import StateTensor, Tensor
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.config import Limits


def describe(model: Model, limits: Limits) -> pb.Model:
    """Returns the description of a model that the server runs within `limits`."""
    spec, runtime = model.spec, model.runtime
    return pb.Model(
        name=spec.key.name,
        version=spec.key.version,
        architecture=spec.architecture,
        input_size=spec.input_size,
        hidden_size=spec.hidden_size,
        output_size=spec.output_size,
        num_layers=spec.num_layers,
        class_labels=spec.class_labels,
        feature_names=spec.feature_names,
        runtime=runtime.name,
        runtime_note=model.runtime_note,
        runtime_variant=runtime.variant,
        device=runtime.device,
        artifact=runtime.artifact,
        max_abs_diff=model.max_abs_diff,
        bitwise=model.bitwise,
        limits=pb.Limits(
            max_sequences=limits.max_sequences,
            max_steps=limits.max_steps,
            max_open_sequences=limits.max_open_sequences,
            max_message_bytes=limits.max_message_bytes,
        ),
        test_accuracy=model.test_accuracy,
        inputs=[_tensor(each) for each in spec.inputs],
        outputs=[_tensor(each) for each in spec.outputs],
        states=[_tensor(each) for each in spec.states],
        form=spec.step.form if spec.step else "",
        source_sha256=spec.step.source_sha256 if spec.step else "",
    )


def _tensor(tensor: Tensor | StateTensor) -> pb.Tensor:
    return pb.Tensor(name=tensor.name, dtype=tensor.dtype.name, shape=tensor.shape)
