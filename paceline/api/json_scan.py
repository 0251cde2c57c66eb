"""Where a JSON value ends, in a text that is still growing."""

from __future__ import annotations

import re

_STRUCTURE = re.compile(r'["\\{}\[\]]')


class ValueScan:
    """Finds the end of an object or list by its quotes and brackets. `depth` brackets are open before the text."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._at = 0
        self._quoted = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The length of the text that the value takes; None if it goes on. Looks at no character twice."""
        while self._at < len(text):
            if self._escaped:
                self._escaped = False
                self._at += 1
                continue
            found = _STRUCTURE.search(text, self._at)
            self._at = found.end() if found else len(text)
            if found and self._closes(found[0]):
                return self._at
        return None

    def moved(self, length: int) -> None:
        """So much was cut from the front of the text."""
        self._at = max(0, self._at - length)

    def _closes(self, character: str) -> bool:
        if self._quoted:
            self._quoted = character != '"'
            self._escaped = character == "\\"
            return False
        if character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False
