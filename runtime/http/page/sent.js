/** What the cloud received: the real messages, their sizes, and the first of their numbers. */

import { byId, el } from "./dom.js";
import { activation, bytes, whole } from "./numbers.js";

const MAX_KEPT = 2048;
const MAX_SHOWN = 40;
const MAX_BARS = 40;
const MAX_NUMBERS = 5; // fit a line
const MEANINGS = {
  Hello: "versions and limits",
  OpenSession: "room for a conversation",
  StepBegin: "a token's hidden state",
  ExchangeReply: "what the adapter answers",
  CloseSession: "the conversation is over",
  Ping: "how long is the way?",
};

/**
 * Bytes per token of whole steps, oldest first. A step is a StepBegin and the ExchangeReplies of
 * its session up to the next one; steps of which messages were missed are left out.
 */
export function stepsOf(messages) {
  const steps = [];
  const open = new Map(); // session -> step under way
  let previous = null;
  for (const { number, kind, session_id: session, rows, nbytes } of messages) {
    if (previous !== null && number !== previous + 1) open.clear();
    previous = number;
    const step = open.get(session);
    if (step && kind !== "ExchangeReply") {
      steps.push({ rows: step.rows, perToken: step.nbytes / step.rows });
      open.delete(session);
    }
    if (kind === "StepBegin" && rows > 0) open.set(session, { rows, nbytes });
    else if (step && kind === "ExchangeReply") step.nbytes += nbytes;
  }
  return steps;
}

/** Keeps the latest messages, over many polls, and draws them. */
export class SentView {
  constructor() {
    this.messages = [];
    this.after = -1;
    this.bars = byId("sent-bars");
    for (let at = 0; at < MAX_BARS; at += 1) this.bars.append(el("span"));
  }

  /** Take an answer of the edge. Returns false if the edge began anew and is to be asked again. */
  take({ totals, recent }) {
    const count = Object.values(totals).reduce((sum, { messages }) => sum + messages, 0);
    if (count <= this.after) {
      this.after = -1;
      this.messages = [];
      return false;
    }
    const fresh = recent.filter(({ number }) => number > this.after);
    if (!fresh.length) return true;
    this.messages = [...this.messages, ...fresh].slice(-MAX_KEPT);
    this.after = this.messages.at(-1).number;
    this.showTotals(totals);
    this.showChart();
    this.showRecent(fresh.slice(-MAX_SHOWN));
    byId("sent-none").hidden = true;
    return true;
  }

  showTotals(totals) {
    const rows = Object.entries(totals).sort(([, a], [, b]) => b.nbytes - a.nbytes);
    byId("sent-totals").hidden = false;
    byId("sent-totals").tBodies[0].replaceChildren(
      ...rows.map(([kind, total]) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", title: MEANINGS[kind] ?? null }, kind),
          el("td", {}, whole(total.messages)),
          el("td", {}, bytes(total.nbytes)),
        ),
      ),
    );
  }

  showChart() {
    const steps = stepsOf(this.messages).slice(-MAX_BARS);
    byId("sent-chart").hidden = steps.length === 0;
    if (!steps.length) return;
    const most = Math.max(...steps.map(({ perToken }) => perToken));
    Array.from(this.bars.children, (bar, at) => {
      const step = steps[at - MAX_BARS + steps.length];
      bar.classList.toggle("prompt", Boolean(step) && step.rows > 1);
      bar.style.setProperty("height", step ? `${Math.max((100 * step.perToken) / most, 3)}%` : "0");
      bar.title = step ? `${bytes(step.perToken)} per token, ${step.rows} token(s) in the step` : "";
    });
    const last = steps.at(-1).perToken;
    byId("sent-chart-text").textContent = bytes(last);
    this.bars.setAttribute(
      "aria-label",
      `The last ${steps.length} steps; the latest sent ${bytes(last)} per token, the largest ${bytes(most)}.`,
    );
  }

  showRecent(fresh) {
    const list = byId("sent-recent");
    list.prepend(...fresh.map(row).reverse());
    while (list.children.length > MAX_SHOWN) list.lastChild.remove();
  }
}

function row(message) {
  const shape = message.rows > 0 ? `${message.rows} × ${message.features}` : "no numbers";
  const facts = [shape, message.codec, bytes(message.nbytes)].filter(Boolean).join(" · ");
  const numbers = (message.numbers ?? []).slice(0, MAX_NUMBERS);
  return el(
    "li",
    {},
    el("p", {}, el("strong", { title: MEANINGS[message.kind] ?? null }, message.kind), el("span", {}, facts)),
    numbers.length
      ? el("p", { class: "mono" }, `${numbers.map(activation).join(" ")}${message.rows * message.features > numbers.length ? " …" : ""}`)
      : null,
  );
}
