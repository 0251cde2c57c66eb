"""A grammar's text, brought into llguidance's own form, and whether that can be compiled at all.

Also a program: it compiles one grammar and says what is wrong with it, in a process that can be stopped. Limits
of llguidance's own hold nearly always, but 14 kB of `patternProperties` compile for 14 s and one `multipleOf` takes
350 MB. It imports nothing of this package, so that it starts in a tenth of a second.

    {"kind": "json_schema", "source": "…"}  ── stdin ──►  compile, first mask  ── stdout ──►  {"error": "…" or null}
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_S = 1
"""Seconds of a core that a grammar may take to compile, the start of the program included."""
MEMORY_BYTES = 1 << 30
JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": "[ ]{0,1}", "lenient": False, "coerce_one_of": False}
"""At most one space at each place JSON has room for whitespace: a model that may write any number may never stop."""


def limits() -> LLParserLimits:
    """For what is compiled and for every step: about 15 ms of lexer work, 2 kB for each of the lexer's states."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def own_form(kind: str, source: str) -> str:
    """What LLMatcher takes. Raises ValueError for JSON that is no schema."""
    if kind == "json_schema":
        if not source.lstrip().startswith("{"):
            raise ValueError("a schema is a JSON object")
        return LLMatcher.grammar_from_json_schema(source, overrides=dict(JSON_OPTIONS))  # type: ignore[arg-type]
    return LLMatcher.grammar_from_regex(source) if kind == "regex" else LLMatcher.grammar_from_lark(source)


def embedded(schema: Mapping[str, Any]) -> str:
    """A JSON Schema as a term of a Lark grammar, under the same options as a grammar of its own."""
    return f"%json {json.dumps({**schema, 'x-guidance': dict(JSON_OPTIONS)})}"


def fault(matcher: LLMatcher) -> str | None:
    """In one line, why a fresh matcher matches nothing."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        why = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
        return "no text fits it" if why == "NoExtensionBias" else why or "cannot be compiled"
    return "no text fits it" if matcher.is_stopped() and not matcher.is_accepting() else None


def _check(kind: str, source: str) -> str | None:
    try:
        return fault(LLMatcher(LLTokenizer("byte"), own_form(kind, source), log_level=0, limits=limits()))
    except ValueError as error:
        return str(error)


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    json.dump({"error": _check(**json.load(sys.stdin))}, sys.stdout)


if __name__ == "__main__":
    _main()
