"""The gRPC interface as a Markdown page, from the comments in protos/: part of `paceline.cli.reference`.

    docs/api-grpc.md        every rpc, message and enum of inference.proto

Needs grpcio-tools, which developers have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

PROTO = "paceline/v1/inference.proto"
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
"""Field numbers of descriptors, of which the paths of comments are made: here FileDescriptorProto's."""
_FIELDS, _NESTED, _NESTED_ENUMS, _METHODS, _VALUES = 2, 3, 4, 2, 2
Place = tuple[int, ...]
_ABOUT_THE_FILE: Place = (12,)
"""Of the line `syntax`, above which the file says what it is."""


def descriptor(protos: Path, name: str = PROTO) -> FileDescriptorProto:
    """A proto, with its comments. Raises RuntimeError if it does not compile."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        include = files("grpc_tools") / "_proto"
        command = ["protoc", f"-I{protos}", f"-I{include}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main([*command, name]):
            raise RuntimeError(f"{name} does not compile")
        (found,) = FileDescriptorSet.FromString(out.read_bytes()).file
        return found


def page(file: FileDescriptorProto) -> str:
    """The interface as Markdown: the services, then the messages in the order of the file."""
    comments = {
        tuple(location.path): location.leading_comments
        for location in file.source_code_info.location
        if location.leading_comments
    }
    parts = [_text(comments, _ABOUT_THE_FILE)]
    for place, service in enumerate(file.service):
        parts.append(f"## `{file.package}.{service.name}`\n\n{_text(comments, (_SERVICES, place))}")
        parts.append("\n".join(_methods(file, comments, place)))
    parts.append("## Messages")
    for place, message in enumerate(file.message_type):
        parts += _message(comments, message, message.name, (_MESSAGES, place))
    for place, enum in enumerate(file.enum_type):
        parts.append(_enum(comments, enum, enum.name, (_ENUMS, place)))
    return "\n\n".join(parts) + "\n"


def _methods(file: FileDescriptorProto, comments: Mapping[Place, str], place: int) -> Iterator[str]:
    yield "| Method | Request | Answer | |"
    yield "| --- | --- | --- | --- |"
    for number, method in enumerate(file.service[place].method):
        about = _cell(comments, (_SERVICES, place, _METHODS, number))
        streamed = "stream of " if method.server_streaming else ""
        request, answer = _link(method.input_type), _link(method.output_type)
        yield f"| `{method.name}` | {request} | {streamed}{answer} | {about} |"


def _message(comments: Mapping[Place, str], message: DescriptorProto, name: str, path: Place) -> list[str]:
    nested = {each.name: each for each in message.nested_type}
    lines = [f"### {name}", _text(comments, path)]
    if message.field:
        rows = ["| Field | Type | No. | |", "| --- | --- | --- | --- |"]
        for number, field in enumerate(message.field):
            about = _cell(comments, (*path, _FIELDS, number))
            if field.HasField("oneof_index") and not field.proto3_optional:
                alone = message.oneof_decl[field.oneof_index].name
                about = f"{about} One of `{alone}`.".strip()
            rows.append(f"| `{field.name}` | {_type(field, nested)} | {field.number} | {about} |")
        lines.append("\n".join(rows))
    for place, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            lines += _message(comments, inner, f"{name}.{inner.name}", (*path, _NESTED, place))
    for place, enum in enumerate(message.enum_type):
        lines.append(_enum(comments, enum, f"{name}.{enum.name}", (*path, _NESTED_ENUMS, place)))
    return [line for line in lines if line]


def _enum(comments: Mapping[Place, str], enum: EnumDescriptorProto, name: str, path: Place) -> str:
    rows = ["| Value | No. | |", "| --- | --- | --- |"]
    for place, value in enumerate(enum.value):
        rows.append(f"| `{value.name}` | {value.number} | {_cell(comments, (*path, _VALUES, place))} |")
    return f"### {name}\n\n{_text(comments, path)}\n\n" + "\n".join(rows)


def _type(field: FieldDescriptorProto, nested: Mapping[str, DescriptorProto]) -> str:
    entry = nested.get(field.type_name.rpartition(".")[2])
    if entry is not None and entry.options.map_entry:
        key, value = entry.field
        return f"map of {_type(key, nested)} to {_type(value, nested)}"
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    own = _link(field.type_name) if field.type_name else kind
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {own}"
    return f"optional {own}" if field.proto3_optional else own


def _link(type_name: str) -> str:
    """A type of this file leads to its heading; another's is named."""
    package, _, name = type_name.removeprefix(".paceline.v1.").rpartition(".")
    if package.startswith(".google"):
        return f"`{package.removeprefix('.')}.{name}`"
    full = f"{package}.{name}" if package else name
    return f"[{full}](#{full.lower().replace('.', '')})"


def _text(comments: Mapping[Place, str], path: Sequence[int]) -> str:
    """A comment as paragraphs of one line each."""
    lines = [line.strip() for line in comments.get(tuple(path), "").strip().splitlines()]
    return "\n".join(lines)


def _cell(comments: Mapping[Place, str], path: Sequence[int]) -> str:
    return _text(comments, path).replace("\n", " ").replace("|", "\\|")
