/**
 * The Markdown that models write, as DOM nodes: headings, paragraphs, lists, quotes, tables, code,
 * bold, italics and links. Text stays text: nothing here parses markup, no address but http(s) and
 * mailto becomes a link, and pictures become links, so that nothing outside is ever loaded.
 */

import { copyButton, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MAX_DEPTH = 6;

const indentOf = (line) => line.length - line.trimStart().length;
const isTable = (lines, at) =>
  lines[at].includes("|") && (lines[at + 1] ?? "").includes("-") && DELIMITERS.test(lines[at + 1]);
const startsBlock = (lines, at) =>
  FENCE.test(lines[at]) ||
  HEADING.test(lines[at]) ||
  RULE.test(lines[at]) ||
  QUOTE.test(lines[at]) ||
  ITEM.test(lines[at]) ||
  isTable(lines, at);

/** Blocks as plain data, so that one that has not changed can be told from one that has. */
function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  const take = (parse) => {
    const [block, next] = parse(lines, at, depth);
    blocks.push(block);
    at = next;
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) take(parseFence);
    else if ((match = HEADING.exec(line))) {
      blocks.push({ type: "heading", level: match[1].length, text: match[2].replace(/\s+#+\s*$/, "") });
      at += 1;
    } else if (RULE.test(line)) {
      blocks.push({ type: "rule" });
      at += 1;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) take(parseQuote);
    else if (depth < MAX_DEPTH && ITEM.test(line)) take(parseList);
    else if (isTable(lines, at)) take(parseTable);
    else take(parseParagraph);
  }
  return blocks;
}

function parseFence(lines, start) {
  const [, fence, info] = FENCE.exec(lines[start]);
  const indent = indentOf(lines[start]);
  let end = start + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(start + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return [{ type: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") }, end + 1];
}

function parseQuote(lines, start, depth) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
}

function parseList(lines, start, depth) {
  const [, firstIndent, marker] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(marker);
  const items = [];
  let at = start;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    const belongs = match && match[1].length <= firstIndent.length + 1;
    if (!belongs || /\d/.test(match[2]) !== ordered || RULE.test(lines[at])) break;
    const content = match[1].length + match[2].length + 1;
    const inner = [match[3]];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      if (!line.trim()) {
        const next = lines[at + 1] ?? "";
        if (!next.trim() || indentOf(next) < content) break;
      } else if (indentOf(line) <= firstIndent.length + 1 && startsBlock(lines, at)) break;
      inner.push(line.slice(Math.min(content, indentOf(line))));
      at += 1;
    }
    items.push(parseBlocks(inner, depth + 1));
    // Items may be apart by an empty line.
    if (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  return [{ type: "list", ordered, start: ordered ? parseInt(marker, 10) : 1, items }, at];
}

function parseTable(lines, start) {
  const cells = (line) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split("|")
      .map((cell) => cell.trim());
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(start + 2, end).map(cells);
  return [{ type: "table", head: cells(lines[start]), rows }, end];
}

function parseParagraph(lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end)) end += 1;
  return [{ type: "paragraph", text: lines.slice(start, end).join("\n").trim() }, end];
}

const INLINE =
  /\\([!-/:-@[-`{-~])|(`+)|!?\[((?:[^[\]\\]|\\.)*)\]\(([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:[ \t]+"[^"]*")?\)|https?:\/\/[^\s<>]+|(\*+|_+)|\n/g;
const WORD = /[\p{L}\p{N}]/u;

function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** Nodes of text within a block. */
function inline(text, depth = 0) {
  const parts = []; // nodes, and delimiters that may yet open or close emphasis
  let done = 0;
  const plain = (end) => {
    if (end > done) parts.push(document.createTextNode(text.slice(done, end)));
  };
  INLINE.lastIndex = 0;
  const matches = depth < MAX_DEPTH ? text.matchAll(INLINE) : [];
  for (const match of matches) {
    if (match.index < done) continue;
    let [end, node] = [match.index + match[0].length, null];
    if (match[1] !== undefined) node = document.createTextNode(match[1]);
    else if (match[2]) {
      const close = closingTicks(text, end, match[2].length);
      if (close < 0) continue;
      node = el("code", {}, text.slice(end, close).replace(/^ (.*[^ ].*) $/, "$1"));
      end = close + match[2].length;
    } else if (match[3] !== undefined) {
      node = link(match[4], inline(match[3] || match[4], depth + 1));
    } else if (match[0].startsWith("http")) {
      const address = match[0].replace(/[.,;:!?*_'")\]]+$/, "");
      node = link(address, [address]);
      end = match.index + address.length;
    } else if (match[5]) {
      const [before, after] = [text[match.index - 1] ?? " ", text[end] ?? " "];
      const inWord = match[5][0] === "_" && WORD.test(before) && WORD.test(after);
      node = {
        mark: match[5][0],
        count: match[5].length,
        opens: !inWord && !/\s/.test(after),
        closes: !inWord && !/\s/.test(before),
      };
    } else node = el("br");
    if (node === null) continue;
    plain(match.index);
    parts.push(node);
    done = end;
  }
  plain(text.length);
  return emphasise(parts);
}

function closingTicks(text, from, count) {
  const ticks = /`+/g;
  ticks.lastIndex = from;
  for (let match; (match = ticks.exec(text)); ) if (match[0].length === count) return match.index;
  return -1;
}

/** Pair delimiters, the nearest first; what stays unpaired is text. */
function emphasise(parts) {
  const done = [];
  for (const part of parts) {
    if (part instanceof Node) {
      done.push(part);
      continue;
    }
    while (part.closes && part.count > 0) {
      const opener = done.findLastIndex((other) => other.mark === part.mark && other.opens);
      if (opener < 0 || opener === done.length - 1) break;
      const width = Math.min(2, done[opener].count, part.count);
      const inner = done.splice(opener + 1).map(asNode);
      done[opener].count -= width;
      if (done[opener].count === 0) done.pop();
      part.count -= width;
      done.push(el(width === 2 ? "strong" : "em", {}, ...inner));
    }
    if (part.count > 0) done.push(part);
  }
  return done.map(asNode);
}

const asNode = (part) =>
  part instanceof Node ? part : document.createTextNode(part.mark.repeat(part.count));

function codeBlock({ language, text }) {
  const code = document.createTextNode(text);
  const head = el("div", { class: "code-head" }, el("span", {}, language || "code"), copyButton(() => code.data));
  const body = el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, code));
  return { node: el("div", { class: "code" }, head, body), code };
}

const nodesOf = (blocks) => blocks.map((block) => render(block).node);

function render(block) {
  switch (block.type) {
    case "code":
      return codeBlock(block);
    case "heading":
      // The page has headings of its own above.
      return { node: el(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text)) };
    case "rule":
      return { node: el("hr") };
    case "quote":
      return { node: el("blockquote", {}, ...nodesOf(block.blocks)) };
    case "list":
      return {
        node: el(
          block.ordered ? "ol" : "ul",
          { start: block.ordered && block.start !== 1 ? block.start : null },
          ...block.items.map((item) => el("li", {}, ...itemNodes(item))),
        ),
      };
    case "table":
      return { node: table(block) };
    default:
      return { node: el("p", {}, ...inline(block.text)) };
  }
}

/** An item that begins with a paragraph shows it without a paragraph's distance. */
function itemNodes(blocks) {
  const [first, ...rest] = blocks;
  return first?.type === "paragraph" ? [...inline(first.text), ...nodesOf(rest)] : nodesOf(blocks);
}

function table({ head, rows }) {
  const row = (cells, name) => el("tr", {}, ...cells.map((cell) => el(name, {}, ...inline(cell))));
  return el(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    el(
      "table",
      {},
      el("thead", {}, row(head, "th")),
      el("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
    ),
  );
}

/** Shows a growing text, and touches only the blocks that changed. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = []; // {key, type, language, node, code}
  }

  update(text) {
    const blocks = parseBlocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"));
    blocks.forEach((block, at) => {
      const key = JSON.stringify(block);
      const old = this.shown[at];
      if (old?.key === key) return;
      if (old?.code && block.type === "code" && old.language === block.language) {
        old.code.data = block.text; // keeps what a person selected or scrolled
        old.key = key;
        return;
      }
      const made = { key, language: block.language, ...render(block) };
      if (old) old.node.replaceWith(made.node);
      else this.root.append(made.node);
      this.shown[at] = made;
    });
    for (const extra of this.shown.splice(blocks.length)) extra.node.remove();
  }
}
