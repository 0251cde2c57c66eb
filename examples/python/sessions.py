"""Sessions, with asyncio: python examples/python/sessions.py [127.0.0.1:9000]"""

from __future__ import annotations

import asyncio
import sys

from paceline.client import AsyncClient

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"


async def main() -> None:
    async with AsyncClient(ADDRESS) as client:
        session = await client.session(messages=[{"role": "system", "content": "Be brief."}])
        print((await session.say("My name is Ada.", temperature=0, max_tokens=24)).text)
        fork = await session.fork()  # goes on by itself from here

        # Both at once. Only what is new is sent; what was said is at the server.
        answers = await asyncio.gather(
            session.say("What is my name?", temperature=0, max_tokens=24),
            fork.say("Say it backwards.", temperature=0, max_tokens=24),
        )
        for answer in answers:
            print(f"{answer.text!r}: {answer.metrics.cached_tokens} tokens were in the cache of {answer.replica_id}")

        info = await session.info()
        print(f"{info.turns} turns, {info.history_tokens} tokens, KV at {info.replica_id} ({info.kv_tier})")
        for each in (session, fork):
            await each.delete()


asyncio.run(main())
