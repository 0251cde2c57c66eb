// The cluster view: replicas, drafters, where each session's KV lives, speculation by source. Drawn anew every second.

import { api } from "./api.js";
import { newName } from "./conversation.js";
import { age, brief, byId, count, h, keyed, notify, percent, say, several, size } from "./dom.js";

const NOWHERE = "no replica";

export class Cluster {
  /** `open` shows a session in the chat, `refresh` asks the server again. */
  constructor(open, refresh) {
    this.open = open;
    this.refresh = refresh;
    this.chosen = null;
    this.sessions = [];
    this.targets = [];
  }

  take(status, sessions) {
    this.sessions = sessions;
    this.targets = status.targets;
    drawWarnings(status);
    drawTotals(status, sessions);
    this.#drawMap();
    this.#drawDetail();
    drawCards(byId("targets"), status.targets, targetFacts, (each) => accepted(each));
    drawCards(byId("drafters"), status.drafts, drafterFacts);
    drawSources(status.targets);
    const routes = Object.entries(status.router?.routes ?? {}).filter(([why]) => why).map(([why, times]) => `${why.replaceAll("_", " ")} ${count(times)}`);
    const resumed = status.router?.resumptions ? [`answers resumed elsewhere ${count(status.router.resumptions)}`] : [];
    say(byId("routes"), routes.length ? `Requests by the reason for their place: ${[...routes, ...resumed].join(" · ")}` : "");
  }

  #drawMap() {
    const homes = this.targets.map((target) => target.replica_id);
    const held = Map.groupBy(this.sessions, (session) => (homes.includes(session.replica_id) ? session.replica_id : NOWHERE));
    const columns = [...homes, ...(held.has(NOWHERE) ? [NOWHERE] : [])].map((name) => ({ name, sessions: held.get(name) ?? [] }));
    const longest = Math.max(1, ...this.sessions.map(tokensOf));
    keyed(byId("map"), columns, (column) => column.name, makeColumn, (node, { name, sessions }) => {
      const kv = name === NOWHERE ? "history alone" : `${count(sum(sessions, (each) => each.cached_tokens))} tokens`;
      say(node.querySelector("small"), `${several(sessions.length, "session")} · ${kv}`);
      keyed(node.querySelector(".tiles"), sessions, (each) => each.session_id, (each) => this.#tile(each), (tile, each) => {
        tile.className = `tile ${each.kv_tier ?? (each.replica_id ? "device" : "none")} ${each.running ? "running" : ""}`;
        tile.style.width = `${Math.max(9, (100 * tokensOf(each)) / longest)}%`;
        tile.setAttribute("aria-pressed", String(each.session_id === this.chosen));
        tile.title = `${each.session_id}: ${count(tokensOf(each))} tokens`;
      });
    });
  }

  #tile({ session_id: id }) {
    return h("button", { type: "button", onclick: () => this.#choose(id) }, brief(id, 22));
  }

  #choose(id) {
    this.chosen = this.chosen === id ? null : id;
    this.#drawMap();
    this.#drawDetail();
  }

  #drawDetail() {
    const panel = byId("detail");
    const session = this.sessions.find((each) => each.session_id === this.chosen);
    panel.hidden = !session;
    if (!session) return;
    if (panel.dataset.key !== session.session_id) {
      panel.dataset.key = session.session_id;
      panel.replaceChildren(h("h3", {}, h("code", {}, session.session_id)), h("dl"), this.#actions(session.session_id));
    }
    const facts = [
      ["KV at", session.replica_id ?? "no replica"],
      ["tier", session.running ? `${session.kv_tier}, running` : session.kv_tier ?? "–"],
      ["KV", `${count(session.cached_tokens)} tokens, ${size(session.kv_bytes)}`],
      ["history", session.turns === undefined ? "not stored" : `${count(session.history_tokens)} tokens, ${several(session.turns, "turn")}`],
      ["last used", age(session.updated)],
      ["fork of", session.parent ?? "–"],
    ];
    drawFacts(panel.querySelector("dl"), facts);
    panel.querySelector(".open").disabled = !session.turns;
    panel.querySelector(".fork").disabled = session.turns === undefined;
    this.#drawDestinations(panel.querySelector("select"), session);
  }

  #drawDestinations(select, session) {
    const others = this.targets.map((target) => target.replica_id).filter((name) => name !== session.replica_id);
    const choices = [{ name: "", label: "Move to…" }, ...others.map((name) => ({ name, label: name }))];
    keyed(select, choices, (choice) => choice.name, ({ name, label }) => h("option", { value: name }, label), () => {});
    select.disabled = !session.replica_id || !others.length || session.running;
  }

  #actions(id) {
    const act = (work) => async () => {
      try {
        await work();
        await this.refresh();
      } catch (error) {
        notify(error.message);
      }
    };
    const select = h("select", { "aria-label": "Move to another replica" });
    select.addEventListener("change", () => {
      const to = select.value;
      select.value = "";
      if (to) act(() => api.move(id, to))();
    });
    return h(
      "div.row",
      {},
      h("button.open", { type: "button", onclick: () => this.open(id) }, "Open in chat"),
      h("button.fork", { type: "button", onclick: act(async () => { this.chosen = (await api.fork(id, newName())).session_id; }) }, "Fork"),
      select,
      h("button.danger", { type: "button", onclick: act(() => api.close(id)) }, "Close"),
    );
  }
}

const tokensOf = (session) => Math.max(session.cached_tokens, session.replica_id ? 0 : session.history_tokens ?? 0);
const sum = (items, value) => items.reduce((total, item) => total + (value(item) ?? 0), 0);
const accepted = (target) => percent(target.accepted_tokens, target.drafted_tokens);

function makeColumn({ name }) {
  return h("section.column", { "aria-label": name }, h("h3", {}, h("code", {}, name), h("small.dim")), h("div.tiles"));
}

function drawFacts(list, facts) {
  keyed(list, facts, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (node, [, value]) => say(node.lastChild, String(value)));
}

function drawTotals({ targets, drafts }, sessions) {
  const total = (key) => sum(targets, (each) => each[key]);
  drawFacts(byId("totals"), [
    ["running", count(total("running"))],
    ["waiting", count(total("waiting"))],
    ["KV filled", percent(total("kv_tokens_in_use") + total("kv_tokens_cached"), total("kv_tokens_total"))],
    ["sessions", count(sessions.length)],
    ["acceptance", percent(total("accepted_tokens"), total("drafted_tokens"))],
    ["targets", count(targets.length)],
    ["drafters", count(drafts.length)],
  ]);
}

function drawWarnings({ targets }) {
  const said = Map.groupBy(targets.flatMap((each) => (each.warnings ?? []).map((text) => ({ text, who: each.replica_id }))), ({ text }) => text);
  const lines = [...said].map(([text, from]) => `${text} [${from.map(({ who }) => who).join(", ")}]`);
  byId("warnings").hidden = !lines.length;
  keyed(byId("warnings"), lines, (line) => line, (line) => h("li", {}, line), () => {});
}

const targetFacts = (each) => [
  ["running", count(each.running)],
  ["waiting", count(each.waiting)],
  ["sessions", count(each.sessions)],
  ["acceptance", accepted(each)],
  ["drafters", each.drafters_known === undefined ? "–" : `${each.drafters_connected} of ${each.drafters_known}`],
  ...["host", "disk"].filter((tier) => each[`kv_${tier}_sessions`] !== undefined).map((tier) => [`on ${tier}`, count(each[`kv_${tier}_sessions`])]),
  ...(each.tensor_parallel_size > 1 ? [["ranks", each.tensor_parallel_size]] : []),
];

const drafterFacts = (each) => [
  ["streams", count(each.streams)],
  ["sequences", count(each.sequences)],
  ["drafted", count(each.drafted_tokens)],
  ["rolled back", percent(each.rolled_back_tokens, each.drafted_tokens)],
];

function drawCards(container, replicas, facts) {
  const make = ({ replica_id: name }) =>
    h("article.card", {}, h("h3", {}, h("code", {}, name), h("small.model")), h("div.kv", { role: "img" }, h("i.used"), h("i.cached")), h("small.words"), h("dl"));
  keyed(container, replicas, (each) => each.replica_id, make, (node, each) => {
    const { kv_tokens_total: total = 0, kv_tokens_in_use: used = 0, kv_tokens_cached: cached = 0 } = each;
    const [usedBar, cachedBar] = node.querySelectorAll(".kv i");
    usedBar.style.width = `${total ? (100 * used) / total : 0}%`;
    cachedBar.style.width = `${total ? (100 * cached) / total : 0}%`;
    const words = `KV: ${count(used)} in use, ${count(cached)} cached, of ${count(total)} tokens`;
    node.querySelector(".kv").setAttribute("aria-label", words);
    say(node.querySelector(".words"), words);
    say(node.querySelector(".model"), [each.model, each.address].filter(Boolean).join(" · "));
    drawFacts(node.querySelector("dl"), facts(each));
    node.classList.toggle("warned", Boolean(each.warnings?.length));
  });
  container.classList.toggle("empty", !replicas.length);
}

function drawSources(targets) {
  const rows = new Map();
  for (const target of targets) {
    for (const [name, said] of Object.entries(target.speculation?.sources ?? {})) {
      const row = rows.get(name) ?? { name, drafted: [], accepted: [], wasted: 0 };
      said.drafted.forEach((value, place) => (row.drafted[place] = (row.drafted[place] ?? 0) + value));
      said.accepted.forEach((value, place) => (row.accepted[place] = (row.accepted[place] ?? 0) + value));
      row.wasted += said.wasted ?? 0;
      rows.set(name, row);
    }
  }
  const make = ({ name }) => h("tr", {}, h("th", { scope: "row" }, h(`i.key.${name === "prompt_lookup" ? "lookup" : "draft"}`), name.replace("_", " ")), h("td"), h("td"), h("td"), h("td"), h("td"), h("td", {}, h("div.places")));
  keyed(byId("sources"), [...rows.values()], (row) => row.name, make, (node, row) => {
    const drafted = sum(row.drafted, (value) => value);
    const kept = sum(row.accepted, (value) => value);
    const cells = [drafted, kept, drafted - kept, row.wasted].map(count);
    [...cells, percent(kept, drafted)].forEach((text, index) => say(node.cells[index + 1], text));
    const places = row.drafted.map((value, place) => ({ place, share: value ? row.accepted[place] / value : 0, value }));
    keyed(node.querySelector(".places"), places, ({ place }) => place, () => h("i", { role: "img" }), (bar, { place, share, value }) => {
      bar.style.height = `${Math.max(4, 100 * share)}%`;
      const words = `place ${place + 1}: ${Math.round(100 * share)}% of ${count(value)}`;
      bar.title = words;
      bar.setAttribute("aria-label", words);
    });
  });
  if (!rows.size) byId("sources").replaceChildren(h("tr", { "data-key": "" }, h("td.dim", { colSpan: 7 }, "No candidates yet.")));
}
