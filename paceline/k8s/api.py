"""One API server: objects as plain JSON, refusals as Paceline's errors.

Requests go through the `kubernetes` client's connection pool, which has its TLS, proxies and credentials, and not
through its generated classes: those have a method for each kind, none for one a chart may add, and return None of a
server-side apply that creates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self
from urllib.parse import urlencode

import urllib3

from paceline.errors import ClusterError
from paceline.k8s.errors import NotFound, UnknownKind, Unreachable
from paceline.k8s.kinds import INSTALL, PODS, Obj, Resource, api_root, name_of, resource_of
from paceline.k8s.refusals import Asked, refusal

MANAGER = "paceline"
"""Who owns the fields that were applied."""

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
PAGE = 500
"""Objects of one answer to a list: a namespace may have thousands of events."""


class ApiClient(Protocol):
    """What is needed of `kubernetes.client.ApiClient`."""

    configuration: Any
    rest_client: Any

    def close(self) -> None: ...


class Api:
    """A connection. A context manager; not to be shared between threads that both watch."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._client = client
        self._found: dict[str, dict[str, Resource]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    @property
    def address(self) -> str:
        return str(self._client.configuration.host)

    # what the server has

    def resource(self, api_version: str, kind: str) -> Resource:
        """A kind by its name. Raises UnknownKind with the remedy where its operator is not installed."""
        if (found := self.resources(api_version).get(kind)) is None:
            group = api_version.rpartition("/")[0]
            remedy = INSTALL.get(group, "this Kubernetes is too old for it, or its operator is not installed")
            raise UnknownKind(f"{kind} ({api_version}) is not known here: {remedy}")
        return found

    def resources(self, api_version: str) -> Mapping[str, Resource]:
        """Kinds of a group and version, by kind; empty if the server has no such group. Asked once, if it has."""
        if api_version not in self._found:
            try:
                told = self.call(Asked("discover", api_version), "GET", api_root(api_version))
            except NotFound:
                return {}
            entries = [entry for entry in told["resources"] if "/" not in entry["name"]]
            self._found[api_version] = {entry["kind"]: resource_of(entry, api_version) for entry in entries}
        return self._found[api_version]

    def forget(self, api_version: str) -> None:
        """Ask anew what a group has: an operator may have been installed meanwhile."""
        self._found.pop(api_version, None)

    # objects

    def get(self, resource: Resource, name: str) -> Obj:
        """Raises NotFound."""
        return self.call(self._asked("get", resource, name), "GET", resource.path(self.namespace, name))

    def find(self, resource: Resource, name: str) -> Obj | None:
        """An object, or None if there is none."""
        try:
            return self.get(resource, name)
        except NotFound:
            return None

    def list_all(self, resource: Resource, selector: str = "", fields: str = "") -> list[Obj]:
        """All of a kind that labels and fields select."""
        return self.list_at(resource, selector, fields)[0]

    def list_at(self, resource: Resource, selector: str = "", fields: str = "") -> tuple[list[Obj], str]:
        """The same, and the version of the list, from which a watch goes on."""
        found: list[Obj] = []
        query = {"limit": str(PAGE), "labelSelector": selector, "fieldSelector": fields, "continue": ""}
        while True:
            told = self.call(self._asked("list", resource), "GET", resource.path(self.namespace), query=query)
            # a list leaves out of its items what is the same of all
            found += [{"apiVersion": resource.api_version, "kind": resource.kind} | item for item in told["items"]]
            query["continue"] = told["metadata"].get("continue") or ""
            if not query["continue"]:
                return found, str(told["metadata"]["resourceVersion"])

    def create(self, resource: Resource, obj: Obj, subresource: str = "", name: str = "") -> Obj:
        """POST: a new object, or to a part of one, such as `eviction`."""
        what = self._asked("create", resource, name or (obj.get("metadata") or {}).get("name", ""), subresource)
        return self.call(what, "POST", resource.path(self.namespace, name, subresource), body=obj)

    def apply(self, resource: Resource, obj: Obj, *, force: bool = False, dry_run: bool = False) -> Obj:
        """Server-side apply: fields in `obj` become so, fields applied before and absent now go; others stay.

        Creates what is not there. Raises Conflict for a field that another manager has set, unless `force`.
        """
        query = {"fieldManager": MANAGER, "force": "true" if force else "false"}
        query |= {"dryRun": "All"} if dry_run else {}
        name = name_of(obj)
        path = resource.path(self.namespace, name)
        asked = self._asked("patch", resource, name)
        return self.call(asked, "PATCH", path, query=query, body=obj, content_type=APPLY)

    def patch(self, resource: Resource, name: str, change: Mapping[str, Any], subresource: str = "") -> Obj:
        """Merge a change into an object, or into a part of it, such as `status`."""
        path = resource.path(self.namespace, name, subresource)
        asked = self._asked("patch", resource, name, subresource)
        return self.call(asked, "PATCH", path, query={"fieldManager": MANAGER}, body=change, content_type=MERGE)

    def delete(self, resource: Resource, name: str, *, propagation: str = "Foreground") -> bool:
        """Begin to delete; False if there was nothing."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        try:
            self.call(self._asked("delete", resource, name), "DELETE", resource.path(self.namespace, name), body=body)
        except NotFound:
            return False
        return True

    def logs(self, pod: str, container: str, *, lines: int, previous: bool = False) -> str:
        """The last lines of a container, or of the one before it. Raises ClusterError if there are none."""
        query = {"container": container, "tailLines": str(lines), "previous": "true" if previous else "false"}
        asked = self._asked("get", PODS, pod, "log")
        status, body = self.send("GET", PODS.path(self.namespace, pod, "log"), query=query)
        if status >= 300:
            raise refusal(asked, status, body)
        return body.decode(errors="replace")

    # the wire

    def call(
        self,
        asked: Asked,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
    ) -> Obj:
        """One request for JSON. Raises ClusterError, as one line."""
        status, answer = self.send(method, path, query=query, body=body, content_type=content_type)
        if status >= 300:
            raise refusal(asked, status, answer)
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ClusterError(f"{self.address} answers, but not as a Kubernetes API server does; check the kubeconfig")
        return found

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> tuple[int, bytes]:
        """Status and body, whatever they are. Raises Unreachable."""
        with self._reached():
            response = self._client.rest_client.pool_manager.request(
                method,
                self._url(path, query),
                body=None if body is None else json.dumps(body).encode(),
                headers={**self._headers(content_type), **(headers or {})},
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
                retries=False,
                redirect=False,
            )
        return int(response.status), bytes(response.data)

    def lines(self, asked: Asked, path: str, query: Mapping[str, str], idle_s: float) -> Iterator[bytes]:
        """A streamed answer, line by line; a last one without its end is dropped. Raises Unreachable if it breaks."""
        with self._reached():
            response = self._client.rest_client.pool_manager.request(
                "GET",
                self._url(path, query),
                headers=self._headers(JSON),
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=idle_s),
                retries=False,
                preload_content=False,
            )
            try:
                if response.status >= 300:
                    raise refusal(asked, int(response.status), bytes(response.data))
                rest = b""
                for part in response.stream(decode_content=True):
                    *whole, rest = (rest + part).split(b"\n")
                    yield from whole
            finally:
                response.close()  # half of an answer is left in it: it cannot serve another request

    def _url(self, path: str, query: Mapping[str, str] | None) -> str:
        given = {name: value for name, value in (query or {}).items() if value != ""}
        return f"{self.address.rstrip('/')}{path}{f'?{urlencode(given)}' if given else ''}"

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"Accept": JSON, "Content-Type": content_type, "User-Agent": "paceline"}
        token = self._client.configuration.auth_settings().get("BearerToken")
        if token is not None and token["value"]:
            headers["Authorization"] = str(token["value"])
        return headers

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn urllib3's exceptions into ours."""
        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError) as error:
            why = " ".join(str(error).split())[-160:]
            if "CERTIFICATE_VERIFY_FAILED" in why:  # no patience mends that
                raise ClusterError(f"{self.address} is not who the kubeconfig says it is: {why}") from None
            raise Unreachable(
                f"no Kubernetes API server answers at {self.address} ({type(error).__name__}: {why}); "
                "check --kubeconfig and --context"
            ) from None

    def _asked(self, verb: str, resource: Resource, name: str = "", subresource: str = "") -> Asked:
        what = resource.qualified + (f"/{subresource}" if subresource else "")
        return Asked(verb, what, name, self.namespace if resource.namespaced else None)


def selector(labels: Mapping[str, str | Sequence[str]]) -> str:
    """Labels as an API server takes them; several values are any of them."""
    return ",".join(
        f"{name}={value}" if isinstance(value, str) else f"{name} in ({','.join(value)})"
        for name, value in labels.items()
    )
