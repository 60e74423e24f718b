"""Parameters, outputs and version of a request of the Open Inference Protocol."""

import math
from typing import NamedTuple

from unroll_engine.errors import InvalidRequestError
from unroll_engine.models.spec import ModelSpec
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.oip.signature import outputs_of
from unroll_server.api.oip.tensors import check_content_type
from unroll_server.config import MAX_KEY_BYTES

CLASSIFIED = ("logits", "probabilities")
"""Outputs that `classification` applies to."""

_KINDS = {
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "timeout": ("int64_param", "uint64_param"),
    "priority": ("int64_param", "uint64_param"),
    "triton_enable_empty_final_response": ("bool_param",),
    "content_type": ("string_param",),
    "binary_data_output": ("bool_param",),
}


class Options(NamedTuple):
    """The parameters of a request.

    Attributes:
        sequence: Id of the sequence that the request advances; None for whole sequences.
        start: True if the sequence begins here.
        end: True if the sequence ends here.
        timeout: Seconds after which the answer is useless to the caller.
    """

    sequence: int | str | None
    start: bool
    end: bool
    timeout: float

    def session_id(self, model: str) -> str:
        """Returns the id of the session of the sequence. Each model has ids of its own, and 7 is not "7".

        Raises:
            InvalidRequestError: it is too long.
        """
        separator = "/" if isinstance(self.sequence, str) else "#"
        name = f"{model}{separator}{self.sequence}"
        if len(name.encode()) > MAX_KEY_BYTES:
            most = MAX_KEY_BYTES - len(model.encode()) - 1
            raise InvalidRequestError(f"more than {most} bytes, the most for {model!r}", "parameters[sequence_id]")
        return name


class Wanted(NamedTuple):
    """A requested output.

    Attributes:
        name: An output of the model.
        classes: Number of classes to return, those of the largest values; 0 for all values as float32.
    """

    name: str
    classes: int


def options_of(request: pb.ModelInferRequest) -> Options:
    """Returns the parameters of a request.

    Raises:
        InvalidRequestError: a parameter is unknown, of a wrong type, or does not fit the others.
    """
    values = {name: _value(name, parameter) for name, parameter in request.parameters.items()}
    if "content_type" in values:
        check_content_type(request.parameters["content_type"], "parameters[content_type]")
    # Triton's convention: an id of 0 or "" stands for no sequence.
    sequence = values.get("sequence_id") or None
    start, end = bool(values.get("sequence_start")), bool(values.get("sequence_end"))
    if sequence is None and (start or end):
        which = "sequence_start" if start else "sequence_end"
        raise InvalidRequestError("given without a sequence_id", f"parameters[{which}]")
    microseconds = values.get("timeout", 0)
    for name in ("timeout", "priority"):
        if int(values.get(name, 0)) < 0:
            raise InvalidRequestError(f"{values[name]}, 0 or more expected", f"parameters[{name}]")
    timeout = int(microseconds) / 1e6 if microseconds else math.inf
    return Options(None if isinstance(sequence, bool) else sequence, start, end, timeout)


def wanted_outputs(request: pb.ModelInferRequest, spec: ModelSpec) -> tuple[Wanted, ...]:
    """Returns the outputs of a model that a request names; empty if it names none.

    Raises:
        InvalidRequestError: an output is unknown, named twice, or has a parameter that it can't have.
    """
    if not request.outputs:
        return ()
    known = [each.name for each in outputs_of(spec)]
    wanted: list[Wanted] = []
    for index, output in enumerate(request.outputs):
        name, field = output.name, f"outputs[{index}]"
        if name not in known:
            raise InvalidRequestError(f"no output {name!r}; there are {', '.join(known)}", f"{field}.name")
        if any(name == other for other, _ in wanted):
            raise InvalidRequestError(f"`{name}` is named twice", f"{field}.name")
        classes = 0
        for parameter, value in output.parameters.items():
            where = f"{field}.parameters[{parameter}]"
            if parameter.startswith("shared_memory"):
                raise InvalidRequestError("shared memory is not supported", where)
            if parameter == "content_type":
                check_content_type(value, where)
                continue
            if parameter == "binary_data" and value.WhichOneof("parameter_choice") == "bool_param":
                # A parameter of KServe's protocol over HTTP; over gRPC all outputs are raw.
                continue
            if parameter != "classification":
                problem = "unknown; an output takes `classification`, `content_type` and, as bool_param, `binary_data`"
                raise InvalidRequestError(problem, where)
            if name not in CLASSIFIED or spec.step:
                raise InvalidRequestError(f"`{name}` has no classes; {' and '.join(CLASSIFIED)} have", where)
            if value.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
                raise InvalidRequestError("int64_param expected", where)
            classes = value.int64_param or value.uint64_param
            if classes < 1:
                raise InvalidRequestError(f"{classes}, 1 or more expected", where)
        wanted.append(Wanted(name, classes))
    return tuple(wanted)


def version_of(text: str, field: str) -> int:
    """Returns the number of a version; 0 for the newest if `text` is empty.

    Raises:
        InvalidRequestError: it is not the number of a version.
    """
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text)):
        raise InvalidRequestError(f"{text[:32]!r} is not a version; a positive whole number is expected", field)
    return int(text)


def _value(name: str, parameter: pb.InferParameter) -> int | str | bool:
    kinds = _KINDS.get(name)
    field = f"parameters[{name[:64]}]"
    if kinds is None:
        raise InvalidRequestError(f"unknown; there are {', '.join(_KINDS)}", field)
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in kinds:
        raise InvalidRequestError(f"{kind or 'nothing'} given, {' or '.join(kinds)} expected", field)
    value: int | str | bool = getattr(parameter, kind)
    return value
