"""Throws requests at the HTTP API, made from its OpenAPI document by schemathesis, and reports what is wrong.

    python -m tests.fuzz.http --seconds 600                                over a tiny engine in this process
    python -m tests.fuzz.http --seconds 600 --url http://127.0.0.1:8000

A finding is a 5xx, a response the document does not describe, an error in the log, or a server that no longer answers.
Exit code 1 if there is one. Needs schemathesis: pip install -e '.[fuzz]'.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.grpc import Errors

SHORT = 48
"""Prompt and answer: what is sent matters here, not what is said."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@asynccontextmanager
async def own_server() -> AsyncIterator[str]:
    """The real application over a tiny engine in this process."""
    from paceline.api import create_app
    from tests.api.scripted import gateway
    from tests.api.wire import served
    from tests.rpc.engine_target import engine_target

    with engine_target() as replica:
        async with served(create_app(gateway(replica, context=SHORT))) as port:
            yield f"http://127.0.0.1:{port}"


async def fuzz(url: str, seconds: int, seed: int, *options: str) -> int:
    """What schemathesis ends with: 0 if it found nothing."""
    program = Path(sys.executable).with_name("schemathesis")
    bounds = f"--max-time {seconds} --seed {seed} --request-timeout 30 --continue-on-failure --workers 4".split()
    with TemporaryDirectory() as kept:  # what it remembers from one run to the next
        process = await asyncio.create_subprocess_exec(
            program, "run", f"{url}/openapi.json", "--checks", CHECKS, *bounds, *options, cwd=kept
        )
        return await process.wait()


async def run(options: argparse.Namespace) -> int:
    if options.url:
        return await fuzz(options.url, options.seconds, options.seed)
    errors = Errors()
    logging.getLogger().addHandler(errors)
    async with own_server() as url:
        found = await fuzz(url, options.seconds, options.seed)
    for entry in errors.found[:50]:
        print(f"FINDING {entry}", file=sys.stderr)
    print(f"{len(errors.found)} errors in the log")
    return found or bool(errors.found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.http", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a server; without it one is made in this process")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
