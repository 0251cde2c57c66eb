"""The page about the gRPC interface says what the proto says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from paceline.cli.grpc_reference import descriptor, page
from paceline.cli.reference import ROOT

PROTO = """
// What it is about.
syntax = "proto3";

package paceline.v1;

// A service.
service Bakery {
  // Bakes | sells.
  rpc Bake(Loaf) returns (stream Loaf);
}

// A loaf.
message Loaf {
  // In grams,
  // when cold.
  optional uint32 weight = 3;
  map<string, Grain> grains = 4;
  oneof form {
    string tin = 5;
  }
}

// What is milled.
enum Grain {
  // Never.
  GRAIN_UNSPECIFIED = 0;
}
"""


@pytest.fixture(scope="module")
def file() -> FileDescriptorProto:
    return descriptor(ROOT / "protos")


def test_comments_types_and_numbers_are_told(tmp_path: Path) -> None:
    (tmp_path / "bakery.proto").write_text(PROTO)
    told = page(descriptor(tmp_path, "bakery.proto"))
    assert told.startswith("What it is about.\n\n## `paceline.v1.Bakery`\n\nA service.\n")
    assert "| `Bake` | [Loaf](#loaf) | stream of [Loaf](#loaf) | Bakes \\| sells. |" in told
    assert "| `weight` | optional uint32 | 3 | In grams, when cold. |" in told
    assert "| `grains` | map of string to [Grain](#grain) | 4 |  |" in told
    assert "| `tin` | string | 5 | One of `form`. |" in told
    assert "| `GRAIN_UNSPECIFIED` | 0 | Never. |" in told


def test_a_proto_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.proto").write_text("message {")
    with pytest.raises(RuntimeError, match=r"bad\.proto does not compile"):
        descriptor(tmp_path, "bad.proto")


def test_every_link_leads_to_a_heading(file: FileDescriptorProto) -> None:
    told = page(file)
    headings = {title.lower().replace(".", "") for title in re.findall(r"^### (.+)$", told, re.MULTILINE)}
    assert set(re.findall(r"\(#([^)]+)\)", told)) <= headings


def test_every_method_message_and_enum_says_what_it_is(file: FileDescriptorProto) -> None:
    commented = {tuple(each.path) for each in file.source_code_info.location if each.leading_comments}
    wanted = {(4, n) for n in range(len(file.message_type))} | {(5, n) for n in range(len(file.enum_type))}
    wanted |= {(6, 0)} | {(6, 0, 2, n) for n in range(len(file.service[0].method))}
    assert wanted <= commented
