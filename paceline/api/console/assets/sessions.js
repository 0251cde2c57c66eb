// The list of sessions beside the chat.

import { api } from "./api.js";
import { newName } from "./conversation.js";
import { age, brief, byId, count, h, icon, keyed, notify, say, several } from "./dom.js";

const SHOWN = 50;
const FORK = "M4 2v12M4 8h4q4 0 4-4V2M10 4l2-2 2 2";
const CROSS = "M4 4l8 8M12 4l-8 8";

export class Sessions {
  /** `chat` is asked which session is open, and told to open another. */
  constructor(chat) {
    this.chat = chat;
    this.cards = [];
  }

  take(cards) {
    this.cards = cards.toSorted((a, b) => (b.updated ?? 0) - (a.updated ?? 0) || a.session_id.localeCompare(b.session_id));
    this.draw();
  }

  draw() {
    const open = this.chat.conversation.id;
    const shown = this.cards.slice(0, SHOWN);
    keyed(byId("sessions"), shown, (card) => card.session_id, (card) => this.#make(card), (node, card) => {
      const button = node.querySelector(".open");
      if (card.session_id === open) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      button.disabled = !card.turns;
      node.querySelector(".dot").className = `dot tier ${card.running ? "running" : ""} ${card.kv_tier ?? "none"}`;
      const turns = card.turns ? several(card.turns, "turn") : "no history";
      const tokens = count(card.history_tokens ?? card.cached_tokens);
      say(node.querySelector("small"), [turns, `${tokens} tokens`, card.updated && age(card.updated)].filter(Boolean).join(" · "));
    });
    const more = this.cards.length - shown.length;
    byId("more-sessions").hidden = more <= 0;
    say(byId("more-sessions"), `and ${more} older ones; the cluster view shows all`);
  }

  #make({ session_id: id, parent }) {
    const name = brief(id, 24);
    return h(
      "li",
      {},
      h("button.open", { type: "button", title: parent ? `${id}, fork of ${parent}` : id, onclick: () => this.chat.resume(id) },
        h("span", {}, h("i.dot.tier"), h("code", {}, name)), h("small")),
      h("button.quiet", { type: "button", title: "Fork", "aria-label": `Fork ${id}`, onclick: () => this.#fork(id) }, icon(FORK)),
      h("button.quiet", { type: "button", title: "Delete", "aria-label": `Delete ${id}`, onclick: () => this.#close(id) }, icon(CROSS)),
    );
  }

  async #fork(id) {
    try {
      await this.chat.resume((await api.fork(id, newName())).session_id);
    } catch (error) {
      notify(error.message);
    }
  }

  async #close(id) {
    try {
      await api.close(id);
      this.take(this.cards.filter((card) => card.session_id !== id));
      if (this.chat.conversation.id === id) byId("new-chat").click();
    } catch (error) {
      notify(error.message);
    }
  }
}
