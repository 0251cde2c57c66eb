// What OpenAI's Node client makes of the server at the address given: one JSON object, for the test to compare.
import OpenAI from "openai";

const client = new OpenAI({ apiKey: "none", baseURL: `${process.argv[2]}/v1`, maxRetries: 0 });
const model = "smollm2-135m";
const messages = [{ role: "user", content: "hi" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const found = {};

found.chat = (await client.chat.completions.create({ model, messages })).choices[0].message.content;

found.streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
}

const runner = client.chat.completions.stream({ model, messages, tools });
const message = await runner.finalMessage();
const call = message.tool_calls[0];
found.call = [call.function.name, JSON.parse(call.function.arguments)];
const result = { role: "tool", tool_call_id: call.id, content: "rain" };
const answered = await client.chat.completions.create({ model, messages: [...messages, message, result], tools });
found.answered = answered.choices[0].message.content;

found.completion = (await client.completions.create({ model, prompt: "hi", echo: true, max_tokens: 1 })).choices[0].text;

const first = await client.responses.create({ model, input: "hi" });
found.response = first.output_text;
found.events = [];
const events = client.responses.stream({ model, input: "more", previous_response_id: first.id });
for await (const event of events) {
  if (found.events.at(-1) !== event.type) found.events.push(event.type);
}
found.final = (await events.finalResponse()).output_text;

try {
  await client.embeddings.create({ model, input: "hi" });
} catch (error) {
  found.refused = [error.status, error.param];
}

found.models = (await client.models.list()).data.map((each) => each.id);
console.log(JSON.stringify(found));
