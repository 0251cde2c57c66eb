// The server's API: requests with the key, errors as one sentence with the remedy, Server-Sent Events.

import { settings } from "./settings.js";

/** An error in the server's words. `code` is its machine-readable word, `status` 0 if there was no answer. */
export class Refusal extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const sessionPath = (id) => `v1/sessions/${encodeURIComponent(id)}`;

export const api = {
  models: () => json("v1/models"),
  status: () => json("status"),
  sessions: async () => (await json("v1/sessions")).data,
  session: (id) => json(sessionPath(id)),
  messages: async (id) => (await json(`${sessionPath(id)}/messages`)).data,
  fork: (id, name) => json(`${sessionPath(id)}/fork`, "POST", { session_id: name }),
  move: (id, replica) => json(`${sessionPath(id)}/move`, "POST", replica ? { replica } : {}),
  close: (id) => json(sessionPath(id), "DELETE"),
  /** The chunks of an answer: of the session's next turn if `append`, else of a conversation given whole. */
  answer: (id, append, body, seed, signal) =>
    append
      ? events(`${sessionPath(id)}/turns`, seeded(body, seed), signal)
      : events("v1/chat/completions", seeded({ ...body, session_id: id }, seed), signal),
};

/** The body as JSON. A seed has 64 bits, more than a number of JavaScript's holds, so it stays the digits it is. */
function seeded(body, seed) {
  const text = JSON.stringify(body);
  return seed ? `${text.slice(0, -1)},"seed":${seed}}` : text;
}

async function request(path, method, text, signal) {
  const headers = {};
  if (settings.key) headers.authorization = `Bearer ${settings.key}`;
  if (text !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: text, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Check that it runs: paceline status");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function json(path, method = "GET", body = undefined) {
  return (await request(path, method, body && JSON.stringify(body), AbortSignal.timeout(15000))).json();
}

async function refusal(response) {
  const said = await response.json().catch(() => ({}));
  return sentence(said.error, response.status, response.headers.get("retry-after"));
}

function sentence(error, status, retryAfter) {
  const message = error?.message ?? `The server answered ${status}.`;
  const remedies = {
    401: "Set an API key under Settings.",
    403: "This API key does not allow it; set another one under Settings.",
    429: retryAfter ? `Try again in ${retryAfter} s.` : "Try again shortly.",
  };
  const remedy = remedies[status];
  return new Refusal(remedy ? `${message} – ${remedy}` : message, { status, code: error?.code });
}

async function* events(path, text, signal) {
  const response = await request(path, "POST", text, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw sentence(event.error, 200);
      if (event.paceline?.seed !== undefined) event.paceline.seed = /"seed":(-?\d+)/.exec(data)[1]; // all 64 bits of it
      yield event;
    }
  }
}
