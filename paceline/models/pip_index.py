"""Where a wheel is, according to the user's own pip.

pip is asked instead of a fixed address: it knows the index, mirrors, find-links, proxies and certificates
this user configured, and prints a URL without downloading (on an index that serves metadata separately).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence

from paceline.errors import ModelError

LOCATE = ("--dry-run", "--quiet", "--no-input", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report=-")
"""Install nothing, print what would be. Only wheels: a user who prefers source packages would be given an sdist."""

LOCATE_TIMEOUT_S = 300.0
SETTING_TIMEOUT_S = 30.0


def locate(project: str, version: str) -> str:
    """URL (https:, http: or file:) of the wheel of `project` at `version`.

    Raises ModelError if pip is missing, too old, or cannot find the wheel.
    """
    requirement = f"{project}=={version}"
    done = _pip(["install", *LOCATE, requirement], LOCATE_TIMEOUT_S, what=f"looking for {requirement}")
    if done.returncode != 0:
        raise ModelError(explain(requirement, done.stderr))
    try:
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError):
        raise ModelError(f"pip gave no address for {requirement}; upgrade it: {_command()} install -U pip") from None


def configured_cert() -> str | None:
    """pip's `cert` setting from its configuration files, if there is one."""
    done = _pip(["config", "list"], SETTING_TIMEOUT_S, what="reading its settings")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        try:
            found[key] = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue  # not a setting
    return found.get("install.cert") or found.get("global.cert")


def _pip(arguments: Sequence[str], timeout_s: float, *, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pip took over {timeout_s:.0f} s {what}; check the network and pip's index (pip config list)"
        ) from None


def explain(requirement: str, stderr: str) -> str:
    """pip's complaint as one line with a remedy."""
    if "No module named pip" in stderr:
        return f"pip is needed to find {requirement}; install it: {sys.executable} -m ensurepip"
    if "no such option" in stderr:
        return f"this pip is too old to find {requirement}; upgrade it: {_command()} install -U pip"
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    last = errors[-1] if errors else "no reason given"
    return (
        f"cannot find {requirement}: the package index is unreachable or does not have it (pip: {last}); "
        "check the network and pip's settings (pip config list), or name a model folder or a .gguf file instead"
    )


def _command() -> str:
    return f"{sys.executable} -m pip"
