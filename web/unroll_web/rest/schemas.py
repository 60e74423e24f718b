"""JSON schemas of the REST API's bodies and answers."""

from typing import Any

from unroll_web.rest.floats import FORMATS
from unroll_web.rest.tensors import DATATYPES
from unroll_web.rest.unroll import RESULTS

Schema = dict[str, Any]


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema, description: str = "", **others: Any) -> Schema:
    return {"type": "array", "items": items} | ({"description": description} if description else {}) | others


def _object(required: str = "", closed: bool = False, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required.split()
    if closed:
        schema["additionalProperties"] = False
    return schema


def _text(description: str = "") -> Schema:
    return {"type": "string"} | ({"description": description} if description else {})


def _described(schema: Schema, description: str) -> Schema:
    return schema | {"description": description}


_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_VERSION = _described(
    {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0}, "Model version; 0 is the newest."
)
_FLOATS = _described(
    {"type": "string", "enum": list(FORMATS), "default": FORMATS[0]},
    "Form of arrays in the answer: numbers, or little-endian float32 in hex or base64.",
)
_SNAPSHOT = _described(
    {"type": "string", "contentEncoding": "base64"},
    "State of a sequence, to resume from on any server: unroll.v1.Snapshot in base64.",
)
_BYTES = [
    _object("shape " + form, closed=True, shape=_list({"type": "integer", "minimum": 1}), **{form: {"type": "string"}})
    for form in FORMATS[1:]
]
_PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSORS = _list(_object("name datatype shape", name=_text(), datatype=_text(), shape=_list(_INTEGER)))
_TENSORS_OF_A_MODEL = _list(_object("name dtype shape", name=_text(), dtype=_text(), shape=_list(_INTEGER)))

SCHEMAS: dict[str, Schema] = {
    "Problem": _object(
        "type title status detail code",
        type=_text(),
        title=_text(),
        status=_described(_INTEGER, "HTTP status."),
        detail=_text("One line."),
        code=_text("Status of gRPC, such as INVALID_ARGUMENT."),
        reason=_text("Machine-readable cause, such as QUEUED_STEPS."),
        errors=_list(_object("field detail", field=_text(), detail=_text()), "Fields at fault."),
        retry_after=_described(_NUMBER, "Seconds after which a retry can help."),
        request_id=_text(),
        error=_text("As detail, for clients of the Open Inference Protocol."),
    ),
    "Sequence": {
        "description": "Timesteps [steps][features]: numbers, or the bytes of little-endian float32.",
        "anyOf": [_list(_list(_NUMBER, minItems=1), minItems=1), *_BYTES],
    },
    "Array": {
        "description": "float32: numbers, which round-trip, or the bytes in little-endian.",
        "anyOf": [_list({}), *_BYTES],
    },
    "ClassifyRequest": _object(
        "sequences",
        closed=True,
        sequences=_list(_ref("Sequence"), "Sequences of any lengths."),
        version=_VERSION,
        snapshots=_list({"type": ["string", "null"]}, "For each sequence the snapshot to resume from, or null."),
        return_snapshots=_described(_FLAG, "Ask for the state after each sequence."),
        floats=_FLOATS,
    ),
    "ClassifyResponse": _object(
        "model version results",
        model=_text(),
        version=_INTEGER,
        results=_list(
            _object(
                "label label_index probabilities logits",
                label=_text(),
                label_index=_INTEGER,
                probabilities=_ref("Array"),
                logits=_ref("Array"),
                snapshot=_SNAPSHOT,
            ),
            "One for each sequence.",
        ),
    ),
    "UnrollRequest": _object(
        "sequence",
        closed=True,
        sequence=_ref("Sequence"),
        version=_described(_VERSION, "Model version; 0 is the snapshot's, or else the newest."),
        snapshot=_SNAPSHOT,
        every=_described(
            {"type": "integer", "minimum": 1, "maximum": 2**32 - 1, "default": 1}, "Report every n-th step."
        ),
        **{"return": _list({"type": "string", "enum": list(RESULTS)}, "Results of each step; all by default.")},
        floats=_FLOATS,
    ),
    "Events": _text(
        "`open` (model, version, step), `step` for each timestep (step, state, logits, probabilities, label, "
        "label_index; of a step model, outputs by name; its id is the step), and `end` (reason `complete` or "
        "`draining`, step, snapshot). If the sequence fails, `error` (a problem, with the last known step and "
        "snapshot) comes instead of `end`."
    ),
    "Models": _object("models", models=_list(_ref("Model"))),
    "Model": _object(
        "name version architecture",
        name=_text(),
        version=_INTEGER,
        architecture=_text(),
        input_size=_INTEGER,
        hidden_size=_INTEGER,
        output_size=_INTEGER,
        num_layers=_INTEGER,
        class_labels=_list(_text()),
        feature_names=_list(_text()),
        inputs=_TENSORS_OF_A_MODEL,
        outputs=_TENSORS_OF_A_MODEL,
        states=_TENSORS_OF_A_MODEL,
    ),
    "ServerMetadata": _object("name version extensions", name=_text(), version=_text(), extensions=_list(_text())),
    "IndexRequest": _object(closed=True, ready=_described(_FLAG, "Only versions that are ready.")),
    "Index": _list(_object("name version state reason", name=_text(), version=_text(), state=_text(), reason=_text())),
    "InferRequest": _object(
        "inputs",
        closed=True,
        id=_text("Repeated in the answer."),
        parameters=_described(_PARAMETERS, "Such as sequence_id, sequence_start, sequence_end, binary_data_output."),
        inputs=_list(
            _object(
                "name datatype shape",
                closed=True,
                name=_text(),
                datatype=_described({"type": "string", "enum": [*DATATYPES]}, "Number format."),
                shape=_list({"type": "integer", "minimum": 0}),
                parameters=_described(_PARAMETERS, "binary_data_size: bytes of this input after the JSON."),
                data=_list({}, "Elements, flat or nested, unless they are binary."),
            ),
            minItems=1,
        ),
        outputs=_list(
            _object(
                "name",
                closed=True,
                name=_text(),
                parameters=_described(
                    _PARAMETERS, "binary_data (true or false), classification (a number of classes)."
                ),
            ),
        ),
    ),
    "InferResponse": _object(
        "model_name model_version outputs",
        model_name=_text(),
        model_version=_text(),
        id=_text(),
        parameters=_PARAMETERS,
        outputs=_list(
            _object(
                "name datatype shape",
                name=_text(),
                datatype=_text(),
                shape=_list(_INTEGER),
                parameters=_PARAMETERS,
                data=_list({}),
            )
        ),
    ),
    "ModelMetadata": _object(
        "name versions platform inputs outputs",
        name=_text(),
        versions=_list(_text()),
        platform=_text(),
        inputs=_TENSORS,
        outputs=_TENSORS,
    ),
    "ModelConfig": _object("name", name=_text()),
    "Statistics": _object("model_stats", model_stats=_list(_object("name version", name=_text(), version=_text()))),
}
"""Schemas by name, as `components/schemas` of OpenAPI."""
