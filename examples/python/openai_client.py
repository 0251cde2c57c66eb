"""The official openai client: python examples/python/openai_client.py [http://127.0.0.1:8000]"""

from __future__ import annotations

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
(model,) = client.models.list().data

stream = client.chat.completions.create(
    model=model.id,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=32,
    stream=True,
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()

# What OpenAI does not have goes into extra_body: here the model drafts for itself, or not; the text is the same.
for speculation in (True, False):
    answer = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": "Name three colours."}],
        temperature=0.5,
        seed=7,
        max_tokens=32,
        extra_body={"speculation": speculation},
    )
    print(f"speculation {speculation}: {answer.choices[0].message.content!r}")
