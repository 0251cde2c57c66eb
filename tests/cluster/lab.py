"""Three hosts on one machine: namespaces of the kernel with an sshd each, and a network of their own.

A host has its own processes, files under /tmp and in its home, shared memory, name and address; it shares the machine's
cores, memory and file system, and the Python packages that the tests run with. Needs root, iproute2, OpenSSH.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ADDRESSES = {"h0": "10.77.0.10", "w1": "10.77.0.11", "w2": "10.77.0.12"}
OPERATOR = "10.77.0.1"
TOOLS = ("ip", "unshare", "ssh", "ssh-keygen", "rsync")
CLONE_NEWNET = 0x40000000
START_TIMEOUT_S = 20.0


def missing() -> str | None:
    """Why there can be no lab here; None if there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        absent.append("sshd (openssh-server)")
    return f"not installed: {', '.join(absent)}" if absent else None


class Lab:
    """A context manager; at its end no process and no namespace is left, whatever happened in between."""

    def __init__(self) -> None:
        # Not under /tmp, which each host has for itself.
        self.folder = Path(tempfile.mkdtemp(prefix="paceline-lab-", dir="/var/tmp"))
        self._prefix = f"pl{os.getpid()}"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self.key, self.wheels = self.folder / "key", self.folder / "wheels"

    def __enter__(self) -> Lab:
        try:
            self._prepare()
            self._network()
            for name in ADDRESSES:
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cluster_file(self) -> Path:
        """`cluster/onprem.yaml` with this lab's addresses and key, and the wheel in `wheels` in place of a download."""
        text = (ROOT / "cluster" / "onprem.yaml").read_text()
        install = f"sh {HERE / 'install.sh'} ~/paceline {self.wheels} {sys.executable}"
        for before, after in (
            ("10.0.0.1", "10.77.0.1"),
            ("ssh_user: paceline", "ssh_user: root"),
            ("~/.ssh/id_ed25519", str(self.key)),
            ("~/paceline/bin/pip install 'paceline==0.1.0'", install),
        ):
            assert before in text, before
            text = text.replace(before, after)
        file = self.folder / "onprem.yaml"
        file.write_text(text)
        return file

    def start(self, name: str) -> None:
        """Boot a host, for the first time or after `lose`; returns when it answers over SSH."""
        own_tmp = self.folder / name / "tmp"
        shutil.rmtree(own_tmp, ignore_errors=True)
        own_tmp.mkdir()
        own_tmp.chmod(0o1777)
        self._ip("-n", self._space("lab"), "link", "set", f"v-{name}", "up")
        log = (self.folder / name / "sshd.log").open("ab")
        self._inits[name] = subprocess.Popen(
            ["ip", "netns", "exec", self._space(name), "unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts",
             "--ipc", "bash", str(HERE / "host.sh"), str(self.folder), name],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        log.close()
        for _ in range(int(START_TIMEOUT_S / 0.2)):
            if self.ssh(name, "true").returncode == 0:
                return
        raise RuntimeError(f"{name} does not answer: {(self.folder / name / 'sshd.log').read_text()}")

    def lose(self, name: str) -> None:
        """Pull its plug: the network goes first, so that nobody is told."""
        self._ip("-n", self._space("lab"), "link", "set", f"v-{name}", "down")
        init = self._inits.pop(name)
        init.kill()
        init.wait()

    def ssh(self, name: str, command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        options = ["-q", "-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                   "-o", "ConnectTimeout=2", "-o", "BatchMode=yes"]  # fmt: skip
        return self.run(["ssh", *options, f"root@{ADDRESSES[name]}", command], timeout=timeout)

    def processes(self, name: str) -> str:
        """Command lines of all that runs there."""
        return self.ssh(name, "ps -eo pid,args").stdout

    def run(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """As the operator: on a machine of the same network, with a home and a /tmp of its own."""
        home = self.folder / "operator"
        script = f'mount --make-rprivate / && mount --bind {home}/tmp /tmp && exec "$@"'
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "120",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._space("lab"), "unshare", "--mount", "bash", "-c", script, "_", *command],
            env=environment, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    @contextmanager
    def network(self) -> Iterator[None]:
        """In it, this thread's new sockets are those of the operator's machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as before:
            with Path(f"/run/netns/{self._space('lab')}").open() as inside:
                if libc.setns(inside.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                libc.setns(before.fileno(), CLONE_NEWNET)

    def close(self) -> None:
        for init in self._inits.values():
            init.kill()
            init.wait()
        self._inits.clear()
        for name in (*ADDRESSES, "lab"):
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def spaces(self) -> list[str]:
        """Network namespaces of this lab that exist."""
        return [line for line in self._ip("netns", "list").splitlines() if line.startswith(self._prefix)]

    def _prepare(self) -> None:
        (self.folder / "operator" / "tmp").mkdir(parents=True)
        for file in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / file)], check=True)
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        cache = Path.home() / ".cache" / "paceline"
        for name in ADDRESSES:
            home = self.folder / name / "home"
            (home / ".cache").mkdir(parents=True)
            (home / ".cache" / "paceline").symlink_to(cache)
            # The interpreter of the tests' own: a system's often has no venv.
            (home / ".bashrc").write_text(f"export PATH={sys.base_prefix}/bin:$PATH\n")

    def _network(self) -> None:
        lab = self._space("lab")
        self._ip("netns", "add", lab)
        self._ip("-n", lab, "link", "set", "lo", "up")
        self._ip("-n", lab, "link", "add", "br0", "type", "bridge")
        self._ip("-n", lab, "addr", "add", f"{OPERATOR}/24", "dev", "br0")
        self._ip("-n", lab, "link", "set", "br0", "up")
        for name, address in ADDRESSES.items():
            space = self._space(name)
            self._ip("netns", "add", space)
            self._ip("link", "add", f"v-{name}", "netns", lab, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", lab, "link", "set", f"v-{name}", "master", "br0", "up")
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    @staticmethod
    def _ip(*words: str) -> str:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
