"""Changes of objects as they come, over lost connections, restarted servers and versions that are forgotten.

A watch is a list, and then a stream of what changed since. The stream ends whenever the server likes; when it cannot
be gone on with where it ended (410 Gone), there is a list again. What a list says that was not known is reported as
the change it must have been, so that nobody who reads on misses one, though several of an object may come as one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from paceline.k8s.api import Api
from paceline.k8s.errors import Gone, Unreachable
from paceline.k8s.kinds import Obj, Resource, name_of
from paceline.k8s.refusals import Asked

Change = Literal["ADDED", "MODIFIED", "DELETED"]
SLICE_S = 30.0
"""A stream is asked for no longer: a connection that died without a word is noticed after that."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A change, and the object as it is after it; of a deletion, as it was."""

    change: Change
    object: Obj


class Watch:
    """Of the objects of a kind that labels or fields select, in the connection's namespace.

    `on_trouble` is told each time a connection is lost, with the reason. `sleep` and `clock` are for tests.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        *,
        selector: str = "",
        fields: str = "",
        on_trouble: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._resource = api, resource
        self._selector, self._fields = selector, fields
        self._on_trouble, self._sleep, self._clock = on_trouble, sleep, clock
        self._version = ""  # empty: begin with a list
        self.known: dict[str, Obj] = {}
        """Every object that is there, by its name."""

    def changes(self, seconds: float) -> Iterator[Seen]:
        """What changes within so many seconds; first all that is there, unless it was told in an earlier call.

        Raises ClusterError for what no patience mends, such as a right that is missing.
        """
        deadline, pause = self._clock() + seconds, FIRST_PAUSE_S
        while (left := deadline - self._clock()) > 0:
            try:
                if not self._version:
                    yield from self._listed()
                for seen in self._streamed(min(left, SLICE_S)):
                    pause = FIRST_PAUSE_S
                    yield seen
                    if self._clock() >= deadline:
                        return
            except Gone:
                self._version = ""
            except Unreachable as error:
                # A stream that is silent until its end may end as a read that timed out: that is no trouble.
                if deadline - self._clock() <= 0:
                    return
                self._on_trouble(error.message)
                self._sleep(min(pause, max(0.0, deadline - self._clock())))
                pause = min(LONGEST_PAUSE_S, pause * 2)

    def _listed(self) -> Iterator[Seen]:
        """All that is there, told as the changes since it was last known."""
        found, version = self._api.list_at(self._resource, self._selector, self._fields)
        before, self.known = self.known, {name_of(obj): obj for obj in found}
        self._version = version
        for name, obj in before.items():
            if name not in self.known:
                yield Seen("DELETED", obj)
        for name, obj in self.known.items():
            if name not in before:
                yield Seen("ADDED", obj)
            elif _version(before[name]) != _version(obj):
                yield Seen("MODIFIED", obj)

    def _streamed(self, seconds: float) -> Iterator[Seen]:
        query = {
            "watch": "1",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
            "labelSelector": self._selector,
            "fieldSelector": self._fields,
        }
        asked = Asked("watch", self._resource.qualified, namespace=self._api.namespace)
        path = self._resource.path(self._api.namespace)
        for line in self._api.lines(asked, path, query, idle_s=seconds + 2.0):
            if (seen := self._read(line)) is not None:
                yield seen

    def _read(self, line: bytes) -> Seen | None:
        """One line of the stream; None if it is only a bookmark. Raises Gone."""
        event = json.loads(line)
        change, obj = event["type"], event["object"]
        if change == "ERROR":
            # 410, or whatever else ended the stream: a list says how things are
            raise Gone(str(obj.get("message")))
        self._version = _version(obj)
        if change == "BOOKMARK":
            return None
        if change == "DELETED":
            self.known.pop(name_of(obj), None)
        else:
            self.known[name_of(obj)] = obj
        return Seen(change, obj)


def _version(obj: Obj) -> str:
    return str(obj["metadata"]["resourceVersion"])
