"""paceline.client over gRPC: python examples/python/paceline_client.py [127.0.0.1:9000]"""

from __future__ import annotations

import sys

from paceline.client import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"

with Client(address) as client:
    print(f"{client.models()[0].name} on {len(client.status().targets)} replicas")

    stream = client.stream_chat("What is the capital of France?", temperature=0, max_tokens=32)
    for delta in stream:
        print(delta.text, end="", flush=True)
    metrics = stream.answer().metrics
    print(
        f"\n{metrics.completion_tokens} tokens, {metrics.accepted} of them drafted, {metrics.ttft_s:.2f} s to the first"
    )

    # Two outputs of one prompt, each with the likeliest tokens beside its own.
    answer = client.generate("The capital of France is", n=2, seed=3, max_tokens=4, logprobs=2)
    for output in answer.outputs:
        print(f"{output.text!r} drawn with seed {output.seed}")

    # Whoever knows a request's id can end it; so does closing the stream.
    stream = client.stream_generate("Once upon a time", max_tokens=2000, ignore_eos=True)
    request_id = stream.started().request_id
    print(f"aborted: {client.abort(request_id)}, finished with {stream.answer().finish_reason}")
