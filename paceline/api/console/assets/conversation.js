// One conversation: what was said, and the session of the server that it is.
//
// While both agree, a turn is appended to the server's session and nothing is sent twice. After a stopped or repeated
// answer, which the server does not have so, the conversation is sent whole once, and the session is that from then on.

import { api } from "./api.js";
import { Tinted } from "./prose.js";
import { sampling, settings } from "./settings.js";

/** For a session of this page. */
export const newName = () => `chat-${[...crypto.getRandomValues(new Uint8Array(6))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;

export class Conversation {
  constructor(id = newName(), said = [], parent = null) {
    this.id = id;
    this.parent = parent;
    this.messages = said.map(({ role, content }) => message(role, content));
    this.agreed = said.length > 0;
  }

  static async resumed(id) {
    return new Conversation(id, await api.messages(id));
  }

  async fork() {
    const card = await api.fork(this.id, newName());
    const fork = new Conversation(card.session_id, [], this.id);
    fork.messages = [...this.messages];
    fork.agreed = this.agreed;
    return fork;
  }

  get canFork() {
    return this.agreed;
  }

  get canRetry() {
    return this.messages.at(-1)?.role === "assistant";
  }

  /** Take the last answer back. Returns the question it was given to. */
  takeBack() {
    this.messages.pop();
    this.agreed = false;
    return this.messages.pop().text.text;
  }

  /**
   * Ask, and have the answer grow. `onStep` is called with it after every chunk. If it ends early, what arrived stays;
   * if nothing arrived, the question goes too.
   */
  async ask(question, signal, onStep) {
    if (!this.messages.length && settings.system) this.messages.push(message("system", settings.system));
    const asked = message("user", question);
    const answer = message("assistant", "");
    answer.cost = new Cost();
    this.messages.push(asked, answer);
    onStep(answer);
    try {
      await this.#stream(answer, signal, onStep);
      this.agreed = true;
    } catch (error) {
      this.agreed = false;
      if (!answer.text.text) {
        this.messages = this.messages.slice(0, -2);
        if (this.messages.length === 1 && this.messages[0].role === "system") this.messages = [];
      }
      if (error.name !== "AbortError") throw error;
      answer.cost.stopped = true;
    } finally {
      answer.cost.over = true;
      onStep(answer);
    }
  }

  async #stream(answer, signal, onStep) {
    try {
      await this.#read(answer, this.agreed, signal, onStep);
    } catch (error) {
      // The server forgot the session (a restart, its time to live); we have not.
      if (!this.agreed || error.code !== "session_not_found") throw error;
      await this.#read(answer, false, signal, onStep);
    }
  }

  async #read(answer, append, signal, onStep) {
    const before = this.messages.slice(0, -1);
    const said = (append ? before.slice(-1) : before).map(({ role, text }) => ({ role, content: text.text }));
    const body = { ...sampling(), messages: said };
    for await (const chunk of api.answer(this.id, append, body, settings.seed, signal)) {
      answer.cost.add(chunk);
      for (const choice of chunk.choices) {
        const text = choice.delta?.content ?? "";
        const guessed = chunk.paceline?.verified;
        const split = guessed && text.startsWith(guessed.text) ? guessed.text.length : 0;
        answer.text.add(text.slice(0, split), guessed?.source);
        answer.text.add(text.slice(split));
      }
      onStep(answer);
    }
    if (!answer.cost.usage) throw new Error("The answer ended before it was complete. Try again.");
  }
}

/** What an answer costs: counted here while it streams, the server's own account in the end. */
export class Cost {
  constructor() {
    this.began = performance.now();
    this.first = 0;
    this.last = 0;
    this.tokens = 0;
    this.drafted = 0;
    this.accepted = 0;
    this.bySource = {};
    this.over = false;
  }

  add(chunk) {
    const { token_ids: ids = [], verified } = chunk.paceline ?? {};
    if (chunk.usage) {
      this.usage = chunk.usage;
      this.info = chunk.paceline;
      return;
    }
    if (!ids.length) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.tokens += ids.length;
    if (!verified) return;
    this.drafted += verified.drafted;
    this.accepted += verified.accepted;
    this.bySource[verified.source] = (this.bySource[verified.source] ?? 0) + verified.accepted;
  }

  /** Tokens a second after the first. */
  get rate() {
    if (this.info) {
      const decode = this.info.total_s - this.info.ttft_s;
      return decode > 0 ? (this.usage.completion_tokens - 1) / decode : 0;
    }
    return this.last > this.first ? ((this.tokens - 1) * 1000) / (this.last - this.first) : 0;
  }
}

function message(role, content) {
  const text = new Tinted();
  text.add(content);
  return { role, text };
}
