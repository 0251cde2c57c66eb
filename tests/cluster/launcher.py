"""The cluster launcher files, and checks of what Ray's own validation lets through."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import yaml

from tests.cluster.compute_schema import STORED

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER_FILES = sorted(CLUSTER.glob("*.yaml"))
AWS, GCP = CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"
CLOUDS = [AWS, GCP]
PLACEHOLDER = "ami-00000000000000000"

Config = dict[str, Any]


def read(path: Path) -> Config:
    config: Config = yaml.safe_load(path.read_text())
    return config


def node_types(config: Config) -> dict[str, Config]:
    types: dict[str, Config] = config["available_node_types"]
    return types


def commands(config: Config) -> list[str]:
    """Every command that a node runs."""
    return [line for key, lines in config.items() if key.endswith("_commands") for line in lines]


def unread_provider_keys(config: Config) -> set[str]:
    """Keys under `provider` that nothing in Ray reads: misspelt ones, since its schema takes any."""
    provider = config["provider"]
    return set(provider) - {"type"} - _provider_keys(provider["type"])


@cache
def _provider_keys(kind: str) -> frozenset[str]:
    """What Ray's launcher looks up in a provider's section, found in its source."""
    spec = find_spec("ray.autoscaler")
    assert spec is not None and spec.origin is not None
    private = Path(spec.origin).parent / "_private"
    keys: set[str] = set()
    for source in (*private.glob("*.py"), *(private / kind).rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            keys |= _lookup(node)
    return frozenset(keys)


def _lookup(node: ast.AST) -> set[str]:
    """The name in `provider["name"]` or `provider.get("name", …)`, however the section is called there."""
    if isinstance(node, ast.Subscript):
        section, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        section, key = node.func.value, node.args[0]
    else:
        return set()
    of_provider = re.search(r"""(provider|provider_config|provider_cfg)(['"]\]|['"], \{\}\))?$""", ast.unparse(section))
    return {key.value} if of_provider and isinstance(key, ast.Constant) and isinstance(key.value, str) else set()


def aws_complaints(node_config: Config) -> str:
    """What EC2's own parameter check says to a node's `node_config`; empty if nothing."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    report: str = botocore.validate.ParamValidator().validate(request, shape).generate_report()
    return report


def gcp_complaints(node_config: Config) -> list[str]:
    """What does not fit the body of Compute Engine's instances.insert."""
    validator = jsonschema.Draft202012Validator(json.loads(STORED.read_text()))
    return [error.message for error in validator.iter_errors(node_config)]
