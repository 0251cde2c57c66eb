// What the user chose. The key is kept for this tab alone, the rest in this browser.

import { byId } from "./dom.js";

const KEPT = "paceline-console";
const KEY = "paceline-key";

export const settings = { key: "", system: "", temperature: 0.7, seed: "", max_tokens: 512, speculation: true, colours: true, theme: "" };

/** Read what was kept, fill the form, and keep what changes. `onKey` hears of the key: of the first, and when it changes. */
export function installSettings(onKey) {
  const form = byId("settings");
  Object.assign(settings, JSON.parse(localStorage.getItem(KEPT) ?? "{}"), { key: sessionStorage.getItem(KEY) ?? "" });
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
  const take = () => {
    for (const field of form.elements) {
      if (!field.name || !field.validity.valid) continue;
      settings[field.name] = field.type === "checkbox" ? field.checked : field.value;
    }
    const { key, ...kept } = settings;
    sessionStorage.setItem(KEY, key);
    localStorage.setItem(KEPT, JSON.stringify(kept));
    apply();
  };
  form.addEventListener("input", take);
  form.elements.key.addEventListener("change", onKey); // not with every letter of it
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
  onKey();
}

/** The fields of a request that follow from the settings, but for the seed. An empty one is the server's choice. */
export function sampling() {
  const body = { speculation: settings.speculation, stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.max_tokens !== "") body.max_tokens = Number(settings.max_tokens);
  return body;
}

function apply() {
  document.documentElement.dataset.theme = settings.theme;
  document.documentElement.dataset.colours = settings.colours ? "on" : "off";
}
