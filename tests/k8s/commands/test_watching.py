"""A watch goes on over lost connections and forgotten versions; nothing that changed meanwhile is missed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import pytest

from paceline.k8s.api import Api
from paceline.k8s.connect import connect
from paceline.k8s.errors import Denied, Gone, Unreachable
from paceline.k8s.kinds import RAY_SERVICES, Obj, Resource, name_of
from paceline.k8s.refusals import Asked
from paceline.k8s.watching import Watch

pytestmark = pytest.mark.k8s

MAPS = Resource("", "v1", "configmaps", "ConfigMap")
PATIENCE_S = 30.0


def config_map(name: str, value: str = "1") -> Obj:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": value}}


def first(watch: Watch, number: int) -> list[tuple[str, str]]:
    """So many changes: what, and of which object; none of root certificates that a controller may put there."""
    found: list[tuple[str, str]] = []
    for seen in watch.changes(PATIENCE_S):
        if not name_of(seen.object).startswith("kube-"):
            found.append((seen.change, name_of(seen.object)))
        if len(found) == number:
            break
    return found


def test_what_is_there_comes_first_and_then_what_changes(api: Api) -> None:
    api.apply(MAPS, config_map("a"))
    watch = Watch(api, MAPS)
    assert first(watch, 1) == [("ADDED", "a")]
    api.apply(MAPS, config_map("a", "2"))
    api.apply(MAPS, config_map("b"))
    api.delete(MAPS, "a", propagation="Background")
    assert first(watch, 3) == [("MODIFIED", "a"), ("ADDED", "b"), ("DELETED", "a")]
    assert set(watch.known) - {"kube-root-ca.crt"} == {"b"}


def test_the_server_forgets_old_versions(api: Api) -> None:
    """That the next test meets what it is about: kinds that came after the first version do not go back to it."""
    query = {"watch": "1", "resourceVersion": "1", "timeoutSeconds": "2"}
    with pytest.raises(Gone):
        for line in api.lines(Asked("watch", "x"), RAY_SERVICES.path(api.namespace), query, idle_s=5.0):
            if (event := json.loads(line))["type"] == "ERROR":
                assert event["object"]["code"] == 410
                raise Gone(event["object"]["message"])


def test_a_version_that_is_forgotten_is_made_up_for_by_a_list(api: Api) -> None:
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "a"},
        "spec": {"rayClusterConfig": {"headGroupSpec": {"template": {"spec": {"containers": []}}}}},
    }
    watch = Watch(api, RAY_SERVICES)
    list(watch.changes(0.1))
    api.apply(RAY_SERVICES, service)
    watch._version = "1"
    assert first(watch, 1) == [("ADDED", "a")]
    api.delete(RAY_SERVICES, "a", propagation="Background")


def test_a_right_that_is_missing_ends_the_watch(kubeconfig: Path, namespace: str) -> None:
    with connect(kubeconfig, "viewer", namespace) as viewer, pytest.raises(Denied, match="list configmaps"):
        next(Watch(viewer, MAPS).changes(PATIENCE_S))


class Cut:
    """A way to the API server that can be cut and mended."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._whole = threading.Event()
        self._whole.set()
        self.refused = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._whole.clear()
        self.refused.clear()
        for each in self._open:
            close(each)
        self._open.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self.cut()
        close(self._listener)
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole.is_set():
                close(near)
                self.refused.set()
                continue
            far = socket.create_connection(self._to)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    close(source)
    close(sink)


def close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.fixture
def way(api: Api) -> Iterator[Cut]:
    where = urlparse(api.address)
    assert where.hostname is not None and where.port is not None
    made = Cut((where.hostname, where.port))
    yield made
    made.close()


@pytest.fixture
def far_api(way: Cut, kubeconfig: Path, namespace: str, api: Api, tmp_path: Path) -> Iterator[Api]:
    """The same server, by a way that can be cut."""
    text = kubeconfig.read_text().replace(f":{urlparse(api.address).port}", f":{way.port}")
    (tmp_path / "kubeconfig").write_text(text)
    with connect(tmp_path / "kubeconfig", namespace=namespace) as made:
        yield made


def test_a_lost_connection_is_told_and_what_changed_meanwhile_is_seen(api: Api, far_api: Api, way: Cut) -> None:
    api.apply(MAPS, config_map("a"))
    api.apply(MAPS, config_map("b"))
    told: list[str] = []

    def mended(text: str) -> None:
        told.append(text)
        way.mend()

    watch = Watch(far_api, MAPS, on_trouble=mended)
    changes = watch.changes(PATIENCE_S)
    assert {name_of(next(changes).object) for _ in range(2)} == {"a", "b"}
    way.cut()
    api.apply(MAPS, config_map("a", "2"))
    api.delete(MAPS, "b", propagation="Background")
    assert [(seen.change, name_of(seen.object)) for seen in (next(changes), next(changes))] == [
        ("MODIFIED", "a"),
        ("DELETED", "b"),
    ]
    assert told != []
    assert all("no Kubernetes API server answers" in text for text in told)


def test_a_stream_that_is_cut_midway_is_taken_up_again(api: Api, far_api: Api, way: Cut) -> None:
    watch = Watch(far_api, MAPS, on_trouble=lambda _: way.mend())
    changes = watch.changes(PATIENCE_S)
    api.apply(MAPS, config_map("a"))
    assert name_of(next(changes).object) == "a"
    api.apply(MAPS, config_map("a", "2"))
    assert next(changes).object["data"] == {"value": "2"}  # out of the open stream
    way.cut()
    api.apply(MAPS, config_map("a", "3"))
    assert next(changes).object["data"] == {"value": "3"}


def test_a_request_without_a_connection_is_unreachable(far_api: Api, way: Cut) -> None:
    way.cut()
    with pytest.raises(Unreachable, match="no Kubernetes API server answers at https://127"):
        far_api.list_all(MAPS)
