"""The messages of ModelInfer that Triton is asked with, after the Open Inference Protocol's published field numbers.

Made at run time: the wire carries no package name, and a generated `inference.*` would clash with the server's own.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

MODEL = "rnn"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_READY = "/inference.GRPCInferenceService/ModelReady"

_PACKAGE = "bench.infer"
_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "Tensor": [("name", 1, "string"), ("datatype", 2, "string"), ("shape", 3, "repeated int64")],
    "ModelInferRequest": [
        ("model_name", 1, "string"),
        ("inputs", 5, "repeated Tensor"),
        ("raw_input_contents", 7, "repeated bytes"),
    ],
    "ModelInferResponse": [("outputs", 5, "repeated Tensor"), ("raw_output_contents", 6, "repeated bytes")],
    "ModelReadyRequest": [("name", 1, "string")],
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="bench/infer.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
            if kind.startswith("repeated "):
                kind, field.label = kind.removeprefix("repeated "), _Field.LABEL_REPEATED
            if kind in _MESSAGES:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


_made = _classes()
ModelInferRequest: Any = _made["ModelInferRequest"]
ModelInferResponse: Any = _made["ModelInferResponse"]
ModelReadyRequest: Any = _made["ModelReadyRequest"]
