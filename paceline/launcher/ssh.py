"""Commands on a host, through the system's own ssh."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from shlex import quote

from paceline.launcher.file import Auth

CONNECT_TIMEOUT_S = 5
NO_CONNECTION = 255
"""What ssh itself ends with; anything else is the command's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a command. `problem` is why there is none: the host was not reached, or took too long."""

    output: str = ""
    problem: str | None = None
    code: int = 0


class Ssh:
    """Runs commands on hosts. Safe to use from several threads."""

    def __init__(self, auth: Auth) -> None:
        self._user = auth.user
        # As Ray does it: a cluster's hosts are installed anew, and Ray itself asks nobody about their keys.
        options = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes" if auth.private_key else None,
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "ProxyCommand": auth.proxy_command,
        }
        self._words = ["ssh", *(["-i", str(auth.private_key)] if auth.private_key else [])]
        for name, value in options.items():
            if value is not None:
                self._words += ["-o", f"{name}={value}"]

    def run(self, address: str, script: str, timeout_s: float) -> Answer:
        """Run a bash script with what ~/.bashrc sets, as Ray runs its commands. Never raises for a host's sake."""
        # An interactive shell, since most hosts' ~/.bashrc does nothing in others; what it says about that is dropped.
        command = f"bash --login -i -c {quote(f'exec 2>&1; source ~/.bashrc; {script}')} 2>/dev/null"
        try:
            done = subprocess.run(
                [*self._words, f"{self._user}@{address}", command],
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            return Answer(problem="there is no ssh on this machine: install an OpenSSH client")
        except subprocess.TimeoutExpired:
            return Answer(problem=f"no answer within {timeout_s:g} s")
        if done.returncode == NO_CONNECTION:
            lines = done.stderr.strip().splitlines()
            return Answer(problem=f"not reached: {lines[-1] if lines else 'ssh gave no reason'}")
        return Answer(done.stdout, code=done.returncode)
