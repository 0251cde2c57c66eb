"""API keys: several, named, hashed, with bounds and rights of their own; read again when their file changes.

A line for each, as `paceline keys create` prints it:

    - {name: "alice", hash: "sha256:9f86…", requests_per_minute: 60, max_concurrent: 4}
    - {name: "operator", hash: "sha256:2c26…", admin: true}

Keys are 256 random bits that we draw ourselves. So a plain SHA-256 is as good as it gets: there is no dictionary to
try, and a slow hash, made for passwords, would cost tens of milliseconds of every request and be a way to overload
the server. A key that somebody made up is not to be had: `paceline keys create` takes none.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Protocol

import yaml
from pydantic import Field, RootModel, ValidationError

from paceline.api.quotas import Bounds, Clock, Quota
from paceline.config import ApiKeySettings, config_error, secret
from paceline.config_base import Positive, Settings
from paceline.errors import ConfigError, Unauthorized

logger = logging.getLogger(__name__)

KEY_PREFIX = "pl-"
KEY_BYTES = 32
REREAD_S = 1.0
"""Between two looks at whether the file has changed."""


class KeyEntry(Settings):
    """One line. Two of one name are one caller with two keys, so that a key can be replaced without a gap."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", repr=False)]
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_concurrent: Positive | None = None
    admin: bool = False

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)

    def words(self) -> list[str]:
        """Its bounds and rights, as they stand in the file."""
        given = self.model_dump(exclude_defaults=True, exclude={"name", "hash"})
        return [f"{name}: {str(value).lower()}" for name, value in given.items()]

    def line(self) -> str:
        """As it stands in the file."""
        return "- {" + ", ".join((f'name: "{self.name}"', f'hash: "{self.hash}"', *self.words())) + "}"


class _Entries(RootModel[list[KeyEntry]]):
    """The whole file."""


class Caller:
    """Who sent a key, its rights, and what it has used."""

    def __init__(self, entry: KeyEntry, clock: Clock = time.monotonic) -> None:
        self.name = entry.name
        self.admin = entry.admin
        self.bounds = entry.bounds
        self.quota = Quota(entry.bounds, clock)


class KeySource(Protocol):
    """Where the lines are."""

    @abstractmethod
    def version(self) -> object:
        """Another one when they have changed. Raises OSError."""

    @abstractmethod
    def read(self) -> str:
        """Raises OSError."""


class KeyFile(KeySource):
    """A file; a mounted secret too, which changes by a link to another one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def version(self) -> object:
        found = self._path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self) -> str:
        return self._path.read_text()


class KeyText(KeySource):
    """Lines that stay as they are."""

    def __init__(self, text: str) -> None:
        self._text = text

    def version(self) -> object:
        return None

    def read(self) -> str:
        return self._text


class KeyRing:
    """Who a key belongs to. A file that is gone, or makes no sense any more, changes nothing; the log says so."""

    def __init__(self, source: KeySource, clock: Clock = time.monotonic) -> None:
        """Raises ConfigError if there are no keys to begin with."""
        self._source = source
        self._clock = clock
        self._callers: dict[str, Caller] = {}
        try:
            self._version = source.version()
            self._names = self._take(parse_keys(source.read()))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys: not readable: {error}", param="api_keys") from None
        self._looked = clock()

    def caller(self, presented: str | None) -> Caller:
        """Raises Unauthorized."""
        self._refresh()
        if not presented:
            raise Unauthorized("no API key: send one as `Authorization: Bearer …`")
        digest, found = hash_of(presented), None
        for known, name in self._names.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise Unauthorized("this API key is not known here")
        return self._callers[found]

    def _refresh(self) -> None:
        if self._clock() - self._looked < REREAD_S:
            return
        self._looked = self._clock()
        try:
            version = self._source.version()
            if version == self._version:
                return
            self._version = version
            self._names = self._take(parse_keys(self._source.read()))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        logger.info("API keys read again: %d", len(self._names))

    def _take(self, entries: list[KeyEntry]) -> Mapping[str, str]:
        """Names by hash. A caller that has not changed keeps its account."""
        for entry in entries:
            known = self._callers.get(entry.name)
            if known is None or (known.bounds, known.admin) != (entry.bounds, entry.admin):
                self._callers[entry.name] = Caller(entry, self._clock)
        return {entry.hash: entry.name for entry in entries}


def open_keys(settings: ApiKeySettings) -> KeyRing | None:
    """The ring the settings name; None if they name none. Raises ConfigError."""
    if settings.file is not None:
        return KeyRing(KeyFile(Path(settings.file).expanduser()))
    if settings.environment is None:
        return None
    text = secret(settings.environment)
    if text is None:
        raise ConfigError(f"api_keys.environment: {settings.environment} is not set", param="api_keys.environment")
    return KeyRing(KeyText(text))


def parse_keys(text: str) -> list[KeyEntry]:
    """The lines of a file. Raises ConfigError, which names the line and the field and quotes nothing."""
    try:
        entries = _Entries.model_validate(yaml.safe_load(text) or []).root
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 0
        raise ConfigError(f"api_keys: not readable as YAML, at line {line}", param="api_keys") from None
    except yaml.YAMLError:
        raise ConfigError("api_keys: not readable as YAML", param="api_keys") from None
    except ValidationError as error:
        raise config_error(error, "api_keys") from None
    seen: dict[str, KeyEntry] = {}
    for entry in entries:
        other = seen.setdefault(entry.name, entry)
        if (other.bounds, other.admin) != (entry.bounds, entry.admin):
            raise ConfigError(f"api_keys: the lines of {entry.name} differ in more than their hash", param="api_keys")
    return entries


def new_key() -> str:
    """A fresh one. It is shown once and kept nowhere."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in HTTP headers or gRPC metadata, names in lower case: as OpenAI, Azure and others send it."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("api-key") or headers.get("x-api-key")
