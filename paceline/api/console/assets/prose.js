// Markdown to elements, by places in the text: each character keeps the source it came from, and so its colour.
//
// What is understood: paragraphs, headings, lists, quotes, fenced code, `code`, **strong**, *emphasis*. All else is
// text as it is. Links are text too: what a model writes shall not lead anybody anywhere.

import { h } from "./dom.js";

/** A text that grows, and who said which part of it. */
export class Tinted {
  constructor() {
    this.text = "";
    this.spans = []; // {end, source}, in order; source "" is the target itself
  }

  add(text, source = "") {
    if (!text) return;
    this.text += text;
    const last = this.spans.at(-1);
    if (last?.source === source) last.end = this.text.length;
    else this.spans.push({ end: this.text.length, source });
  }

  /** Nodes of [start, end): plain text for the target's own, a marked element for accepted candidates. */
  nodes(start, end) {
    const found = [];
    let low = 0;
    let high = this.spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.spans[middle].end <= start) low = middle + 1;
      else high = middle;
    }
    for (let at = start, index = low; at < end && index < this.spans.length; index++) {
      const { end: edge, source } = this.spans[index];
      const piece = this.text.slice(at, Math.min(edge, end));
      found.push(source ? h("span.accepted", { "data-source": source, title: `accepted: ${source.replace("_", " ")}` }, piece) : piece);
      at = edge;
    }
    return found;
  }
}

/** Render into `container`. Blocks that did not change since the last time keep their elements. */
export function render(container, tinted) {
  const old = new Map([...container.children].map((node) => [node.dataset.block, node]));
  const nodes = blocks(tinted.text).map((block) => {
    const name = `${block.kind} ${block.start} ${block.end}`;
    const node = old.get(name) ?? element(block, tinted);
    node.dataset.block = name;
    return node;
  });
  nodes.forEach((node, index) => {
    if (container.children[index] !== node) container.insertBefore(node, container.children[index] ?? null);
  });
  while (container.children.length > nodes.length) container.lastElementChild.remove();
}

const FENCE = /^\s{0,3}(`{3,}|~{3,})/;
const HEADING = /^(#{1,6})\s+/;
const ITEM = /^(\s*)(?:[-*+•]|(\d{1,9})[.)])\s+/;
const QUOTE = /^>\s?/;

/** Blocks of a text: {kind, start, end, …}, places in the text. An unclosed fence goes on to the end. */
export function blocks(text) {
  const found = [];
  let open = null; // the paragraph or fence that goes on
  const close = () => {
    if (open && open.end > open.start) found.push(open);
    open = null;
  };
  let at = 0;
  while (at < text.length) {
    const stop = text.indexOf("\n", at);
    const end = stop < 0 ? text.length : stop;
    const line = text.slice(at, end);
    const fence = FENCE.exec(line)?.[1];
    if (open?.kind === "code") {
      if (fence?.startsWith(open.fence)) close();
      else open.end = end;
    } else if (fence) {
      close();
      const start = Math.min(end + 1, text.length);
      open = { kind: "code", start, end: start, fence };
    } else if (!line.trim()) {
      close();
    } else {
      const heading = HEADING.exec(line);
      const item = heading ? null : ITEM.exec(line);
      const quote = heading || item ? null : QUOTE.exec(line);
      const mark = (heading ?? item ?? quote)?.[0].length ?? 0;
      if (heading || item || quote) close();
      if (heading) found.push({ kind: `h${heading[1].length}`, start: at + mark, end });
      else if (item) open = { kind: item[2] ? "ol" : "ul", start: at + mark, end, depth: item[1].length >> 1, number: item[2] };
      else if (quote) open = { kind: "quote", start: at + mark, end };
      else if (open) open.end = end;
      else open = { kind: "p", start: at, end };
    }
    at = end + 1;
  }
  close();
  return found;
}

function element(block, tinted) {
  if (block.kind === "code") return h("pre", { tabIndex: 0 }, h("code", {}, ...tinted.nodes(block.start, block.end)));
  const content = inline(block.start, block.end, tinted);
  if (block.kind === "ol" || block.kind === "ul") {
    const item = h("div.item", { "data-mark": block.number ? `${block.number}.` : "•" }, h("div", {}, ...content));
    item.style.setProperty("--depth", Math.min(block.depth, 4));
    return item;
  }
  if (block.kind === "quote") return h("blockquote", {}, ...content);
  return block.kind === "p" ? h("p", {}, ...content) : h("p.heading", { role: "heading", "aria-level": block.kind[1] }, ...content);
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|(\*\*|__)(?=\S)([\s\S]*?\S)\3|(?<![\w*])\*(?=[^\s*])([^*\n]*?[^\s*])\*(?![\w*])/g;

/** Nodes of a stretch of prose, marks taken out. A mark that is not closed yet is text. */
function inline(start, end, tinted) {
  const found = [];
  let at = start;
  for (const match of tinted.text.slice(start, end).matchAll(INLINE)) {
    const from = start + match.index;
    const to = from + match[0].length;
    const mark = (match[1] ?? match[3] ?? "*").length;
    found.push(...tinted.nodes(at, from));
    if (match[1]) found.push(h("code", {}, ...tinted.nodes(from + mark, to - mark)));
    else found.push(h(match[3] ? "strong" : "em", {}, ...inline(from + mark, to - mark, tinted)));
    at = to;
  }
  return [...found, ...tinted.nodes(at, end)];
}
