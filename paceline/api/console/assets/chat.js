// The chat view: the conversation as elements, the composer, the buttons.

import { Conversation } from "./conversation.js";
import { byId, count, h, notify, percent, say } from "./dom.js";
import { render } from "./prose.js";

export class Chat {
  constructor(onChange) {
    this.onChange = onChange;
    this.list = byId("messages");
    this.field = byId("message");
    this.stopper = null;
    this.drawing = null;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.field.value.trim());
    });
    byId("stop").addEventListener("click", () => this.stopper?.abort());
    byId("fork").addEventListener("click", () => this.fork());
    byId("retry").addEventListener("click", () => this.retry());
    this.field.addEventListener("keydown", (event) => this.#key(event));
    this.field.addEventListener("input", () => this.#grow());
    this.show(new Conversation());
  }

  get busy() {
    return this.stopper !== null;
  }

  show(conversation) {
    this.conversation = conversation;
    this.list.replaceChildren(...conversation.messages.map(row));
    if (conversation.messages.length) this.list.lastElementChild.scrollIntoView({ block: "end" });
    else this.list.replaceChildren(h("li.empty", {}, "Ask something. Tokens that a drafter guessed and the target accepted are coloured as they stream."));
    this.#state();
    this.onChange();
  }

  /** Stop the answer that is coming, if any. */
  stop() {
    this.stopper?.abort();
    this.stopper = null;
  }

  /** Show a stored session, or say why not. */
  async resume(id) {
    this.stop();
    try {
      this.show(await Conversation.resumed(id));
      this.field.focus();
    } catch (error) {
      notify(error.message);
    }
  }

  async send(question) {
    if (!question || this.busy) return;
    const { conversation } = this;
    const shown = conversation.messages.length;
    notify(null);
    this.field.value = "";
    this.#grow();
    const stopper = new AbortController();
    this.stopper = stopper;
    this.#state();
    try {
      await conversation.ask(question, stopper.signal, () => this.#draw(conversation, shown));
    } catch (error) {
      notify(error.message);
      if (conversation === this.conversation && conversation.messages.length === shown) this.field.value ||= question;
    }
    if (this.stopper === stopper) this.stopper = null;
    this.#drawNow(conversation, shown);
    this.#state();
    this.onChange();
  }

  async fork() {
    try {
      this.show(await this.conversation.fork());
      this.field.focus();
    } catch (error) {
      notify(error.message);
    }
  }

  retry() {
    const question = this.conversation.takeBack();
    this.show(this.conversation);
    this.send(question);
  }

  /** Once a frame, however many chunks come in between. */
  #draw(conversation, from) {
    this.drawing ??= requestAnimationFrame(() => this.#drawNow(conversation, from));
  }

  #drawNow(conversation, from) {
    cancelAnimationFrame(this.drawing);
    this.drawing = null;
    if (conversation !== this.conversation) return;
    const near = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 80;
    if (from === 0) this.list.querySelector(".empty")?.remove();
    conversation.messages.slice(from).forEach((message, index) => {
      const node = this.list.children[from + index];
      if (!node) this.list.append(row(message));
      else if (message.role === "assistant") fill(node, message);
    });
    while (this.list.children.length > Math.max(conversation.messages.length, 0)) this.list.lastElementChild.remove();
    if (near) this.list.scrollTop = this.list.scrollHeight;
  }

  #state() {
    const { conversation, busy } = this;
    say(byId("session-name"), conversation.id);
    say(byId("session-facts"), conversation.parent ? `fork of ${conversation.parent}` : "");
    byId("fork").disabled = busy || !conversation.canFork;
    byId("retry").disabled = busy || !conversation.canRetry;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    this.list.setAttribute("aria-busy", String(busy));
  }

  #key(event) {
    if (event.key === "Escape") this.stopper?.abort();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  }

  #grow() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, 200)}px`;
  }
}

function row(message) {
  const node = h(`li.${message.role}`, { "aria-label": message.role }, h("div.prose"));
  if (message.role === "assistant") node.append(h("p.cost"));
  fill(node, message);
  return node;
}

function fill(node, message) {
  const prose = node.querySelector(".prose");
  if (message.role === "assistant") render(prose, message.text);
  else say(prose, message.text.text);
  const waiting = message.cost && !message.cost.over && !message.text.text;
  node.classList.toggle("waiting", Boolean(waiting));
  if (message.cost) say(node.querySelector(".cost"), inWords(message.cost));
}

/** One line: live figures while it streams, the server's account after it. */
function inWords(cost) {
  const rate = cost.rate ? `${cost.rate.toFixed(1)} tok/s` : "";
  if (!cost.info) {
    const live = [rate, cost.drafted ? `${percent(cost.accepted, cost.drafted)} of candidates accepted` : ""];
    return [cost.stopped ? "stopped" : "", `${cost.tokens} tokens`, ...live].filter(Boolean).join(" · ");
  }
  const { info, usage } = cost;
  return [
    `${usage.completion_tokens} tokens`,
    rate,
    info.drafted_tokens ? `${info.accepted_tokens} of ${info.drafted_tokens} candidates accepted` : "no candidates",
    info.steps ? `${((usage.completion_tokens - 1) / info.steps).toFixed(2)} tokens a step` : "",
    `first after ${info.ttft_s.toFixed(2)} s`,
    `${count(info.cached_tokens)} of ${count(usage.prompt_tokens)} prompt tokens cached`,
    `target ${info.replica_id}`,
    `seed ${info.seed}`,
    info.resumptions ? `resumed ${info.resumptions}×` : "",
  ]
    .filter(Boolean)
    .join(" · ");
}
