"""Messages of protobuf as JSON."""

from typing import Any

from google.protobuf.message import Message


def to_json(message: Message) -> dict[str, Any]:
    """Converts a message to JSON: every field by its name, integers as numbers, enums by their names.

    Fields with presence are left out if they are absent. Of a message that is a choice of one value, such as a
    parameter, the value stands for the message.
    """
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            content[field.name] = {key: _value_of(entry) for key, entry in sorted(value.items())}
        elif field.is_repeated:
            content[field.name] = [_converted(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            content[field.name] = _converted(field, value)
    return content


def _converted(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def _value_of(entry: Any) -> Any:
    if not isinstance(entry, Message):
        return entry
    set_fields = entry.ListFields()
    return set_fields[0][1] if len(set_fields) == 1 else to_json(entry)
