// Elements from data, never from markup; and how numbers are written.

/** An element: `h("p.dim", {title: "…"}, "text", child)`. Properties that begin with "on" are listeners. */
export function h(spec, properties = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  node.classList.add(...classes);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

/** A line drawing of 16 by 16, for a button that has a name. */
export function icon(path) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const line = document.createElementNS(space, "path");
  drawing.setAttribute("viewBox", "0 0 16 16");
  drawing.setAttribute("aria-hidden", "true");
  line.setAttribute("d", path);
  drawing.append(line);
  return drawing;
}

export const byId = (id) => document.getElementById(id);

/**
 * Make the children of `container` those of `items`, in order, one for each key. An element that stays is updated in
 * place, so that it keeps focus and pointer.
 */
export function keyed(container, items, key, make, update) {
  const old = new Map([...container.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const name = String(key(item));
    let node = old.get(name);
    old.delete(name);
    if (!node) {
      node = make(item);
      node.dataset.key = name;
    }
    update(node, item);
    if (container.children[index] !== node) container.insertBefore(node, container.children[index] ?? null);
  });
  for (const node of old.values()) node.remove();
}

/** Set text only where it differs: a screen reader and the layout notice every change. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const count = (value) => Number(value ?? 0).toLocaleString("en-US").replaceAll(",", " ");

/** `3 turns`, `1 turn`. */
export const several = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}%` : "–");

export function size(bytes) {
  if (!bytes) return "–";
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = Math.min(3, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(power > 1 ? 1 : 0)} ${units[power]}`;
}

export function age(seconds, now = Date.now() / 1000) {
  if (!seconds) return "–";
  const gone = Math.max(0, now - seconds);
  if (gone < 60) return `${Math.floor(gone)} s ago`;
  if (gone < 3600) return `${Math.floor(gone / 60)} min ago`;
  return gone < 86400 ? `${Math.floor(gone / 3600)} h ago` : `${Math.floor(gone / 86400)} d ago`;
}

/** A long name as its two ends. */
export const brief = (name, length = 20) =>
  name.length <= length ? name : `${name.slice(0, length - 7)}…${name.slice(-6)}`;

let timer;

/** One line at the top of the page, until dismissed or until the next one. */
export function notify(text) {
  const notice = byId("notice");
  clearTimeout(timer);
  notice.hidden = !text;
  say(notice.querySelector("p"), text ?? "");
  if (text) timer = setTimeout(() => notify(null), 15000);
}
