"""A draft replica in a process of its own: `python -m tests.rpc.draft_process [port]` prints its address.

Each line on its input is answered by what it holds; the end of its input ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys

from tests.rpc.replicas import DraftReplica


async def main(port: int) -> None:
    replica = DraftReplica()
    replica.address = f":{port}"
    await replica.start()
    print(replica.address, flush=True)
    drafter = replica.loop.drafter
    while await asyncio.to_thread(sys.stdin.readline):
        usage = await asyncio.wrap_future(replica.loop.call(drafter.kv.usage))
        held = {"sequences": drafter.num_sequences, "in_use": usage.in_use, "drafted": drafter.drafted_tokens}
        print(json.dumps(held), flush=True)
    await replica.kill()
    replica.loop.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
