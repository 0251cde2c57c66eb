"""What an API server may refuse, apart where a command does something about it.

ClusterError            (paceline.errors)
├── Unreachable         nobody answers
├── Denied              401 or 403
├── NotFound            404: an object, or a namespace
├── UnknownKind         the server has no such kind: an operator is not installed
├── Conflict            409: another manager's field, or a newer version
├── Gone                410: the version a watch was to begin at is forgotten
├── TooMany             429: such as an eviction that a disruption budget holds back
└── NotReady            waited for in vain, or found not to be healthy
"""

from __future__ import annotations

from paceline.errors import ClusterError


class Unreachable(ClusterError):
    """No connection, or one that broke before the answer was whole."""


class Denied(ClusterError):
    """The account has no right to it, or none is given."""


class NotFound(ClusterError):
    pass


class UnknownKind(ClusterError):
    pass


class Conflict(ClusterError):
    pass


class Gone(ClusterError):
    pass


class TooMany(ClusterError):
    pass


class NotReady(ClusterError):
    pass
