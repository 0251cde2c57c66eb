// Wires the views together: which one shows, what is polled, what the header says.

import { api } from "./api.js";
import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { Conversation } from "./conversation.js";
import { byId, notify, say } from "./dom.js";
import { Sessions } from "./sessions.js";
import { installSettings } from "./settings.js";

const PERIOD_MS = { cluster: 1000, chat: 3000 };

let timer;
let view = "chat";

// The key first: whatever asks the server needs it.
installSettings(() => {
  greet();
  poll();
});

const sessions = { list: null };
const chat = new Chat(() => {
  sessions.list?.draw();
  poll();
});
sessions.list = new Sessions(chat);
const cluster = new Cluster((id) => {
  location.hash = "chat";
  chat.resume(id);
}, poll);

/** Ask what the view needs, and again after its period. A hidden tab asks nothing. */
async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const [cards, status] = await Promise.all([api.sessions(), view === "cluster" ? api.status() : null]);
    sessions.list.take(cards);
    if (status) cluster.take(status, cards);
    healthy(true);
  } catch (error) {
    healthy(false, error.message);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, PERIOD_MS[view]);
}

let wasHealthy = true;

function healthy(well, why = "") {
  const dot = byId("health");
  dot.className = `dot ${well ? "well" : "ill"}`;
  dot.setAttribute("aria-label", well ? "connected" : why);
  dot.title = well ? "connected" : why;
  if (!well && wasHealthy) notify(why);
  if (well && !wasHealthy) {
    notify(null);
    greet();
  }
  wasHealthy = well;
}

async function greet() {
  try {
    const { data } = await api.models();
    say(byId("model"), data[0].id);
    document.title = `${data[0].id} – Paceline`;
  } catch (error) {
    healthy(false, error.message);
  }
}

function route() {
  view = location.hash === "#cluster" ? "cluster" : "chat";
  for (const name of ["chat", "cluster"]) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "chat") byId("message").focus();
  poll();
}

function toggleSessions(open) {
  byId("chat").classList.toggle("listing", open);
  byId("toggle-sessions").setAttribute("aria-expanded", String(open));
}

byId("new-chat").addEventListener("click", () => {
  chat.stop();
  chat.show(new Conversation());
  toggleSessions(false);
  byId("message").focus();
});
byId("toggle-sessions").addEventListener("click", () => toggleSessions(!byId("chat").classList.contains("listing")));
byId("sessions").addEventListener("click", () => toggleSessions(false));
byId("notice").querySelector("button").addEventListener("click", () => notify(null));
document.addEventListener("visibilitychange", poll);
addEventListener("hashchange", route);

route();
