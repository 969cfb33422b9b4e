/** The messages of one conversation on the page. Draws what it is given; decides nothing. */

import { byId, copyButton, el, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { seconds, speed } from "./numbers.js";

const NOTES = {
  stopped: "You stopped this answer.",
  interrupted: "This answer was cut off when the page closed.",
  length: "The answer reached its longest permitted length.",
};

const TITLES = {
  key: "The edge asks for an API key",
  cloud: "The cloud is away",
  edge: "The edge is not running",
  "too-long": "Too long for this model",
  busy: "The edge is busy",
  model: "This model is not there",
  cut: "The answer was cut off",
  other: "That did not work",
};

const ADVICE = {
  key: "",
  cloud: "Your conversation is kept. Retry when the cloud is back.",
  edge: "Your conversation is kept. Start privatelora-edge again, then retry.",
  "too-long": "Shorten the message, or begin a new conversation.",
  busy: "It answers others right now. Retry in a moment.",
  model: "Choose another one below, then retry.",
  cut: "What had come is kept.",
  other: "",
};

/** One message: its text, how it ended, and what can be done with it. */
class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "foot" });
    this.markdown = message.role === "assistant" ? new MarkdownView(this.body) : null;
    this.element = el("article", { class: `message ${message.role}`, "data-id": message.id });
    this.who = this.markdown && el("p", { class: "who" });
    this.element.append(...[this.who, this.body, this.foot].filter(Boolean));
    this.editing = false;
  }

  /** Only the text: often, while an answer comes. */
  updateText() {
    if (!this.markdown) this.body.textContent = this.message.content;
    else this.markdown.update(this.message.content);
    this.element.classList.toggle("waiting", this.streaming && !this.message.content);
  }

  get streaming() {
    return this.message.state === "streaming";
  }

  update({ isLast, isLastQuestion, busy }) {
    if (this.editing) return;
    this.element.classList.toggle("streaming", this.streaming);
    this.element.setAttribute("aria-busy", String(this.streaming));
    const name = this.message.model ?? "the model";
    this.element.setAttribute("aria-label", this.markdown ? `Answer of ${name}` : "You");
    if (this.who) this.who.textContent = this.message.model ?? "Answer";
    this.updateText();
    // Drawn anew only if it changes: a button that has the focus keeps it.
    const key = JSON.stringify([this.message.state, this.message.error, isLast, isLastQuestion, busy]);
    if (key === this.footKey) return;
    this.footKey = key;
    this.foot.replaceChildren(
      ...(this.markdown ? this.answerFoot(isLast, busy) : this.questionFoot(isLastQuestion, busy)),
    );
  }

  questionFoot(isLastQuestion, busy) {
    const copy = copyButton(() => this.message.content);
    if (!isLastQuestion || busy) return [el("div", { class: "actions" }, copy)];
    const edit = el("button", { type: "button", class: "quiet", onclick: () => this.edit() }, icon("edit"), "Edit");
    return [el("div", { class: "actions" }, copy, edit)];
  }

  answerFoot(isLast, busy) {
    const { state, error, content, figures } = this.message;
    if (this.streaming) return [];
    const parts = [];
    const note = state === "done" && !content ? "The model answered without a word." : NOTES[state];
    if (note) parts.push(el("p", { class: "note" }, note));
    if (error) parts.push(this.errorLine(error, isLast && !busy));
    const actions = el("div", { class: "actions" });
    if (figures?.completion_tokens) actions.append(el("span", { class: "took" }, tookText(figures)));
    if (content) actions.append(copyButton(() => content));
    if (isLast && !busy && !error) actions.append(this.retryButton("quiet"));
    parts.push(actions);
    return parts;
  }

  errorLine({ kind, message }, canRetry) {
    const text = el(
      "div",
      {},
      el("strong", {}, TITLES[kind] ?? TITLES.other),
      el("p", {}, message),
      ADVICE[kind] ? el("p", {}, ADVICE[kind]) : null,
    );
    const line = el("div", { class: "error", role: "group", "aria-label": "Error" }, text);
    if (!canRetry) return line;
    const buttons = el("div", { class: "error-actions" });
    if (kind === "key") {
      buttons.append(
        el("button", { type: "button", class: "primary", onclick: this.actions.enterKey }, "Enter the key"),
      );
    } else buttons.append(this.retryButton("primary"));
    if (kind === "too-long") {
      buttons.append(
        el("button", { type: "button", class: "secondary", onclick: () => this.actions.startNew() }, "New conversation"),
      );
    }
    line.append(buttons);
    return line;
  }

  retryButton(style) {
    return el("button", { type: "button", class: style, onclick: this.actions.retry }, icon("retry"), "Retry");
  }

  /** Turn a question into a field; sending asks again from there. */
  edit() {
    this.editing = true;
    const field = el("textarea", { "aria-label": "Edit your message", rows: "3" });
    field.value = this.message.content;
    const close = () => {
      this.editing = false;
      this.footKey = null;
      this.actions.redraw();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      close();
      this.actions.resend(this.message, text);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        close();
        this.actions.focusComposer();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const cancel = el("button", { type: "button", class: "secondary", onclick: close }, "Cancel");
    const save = el("button", { type: "button", class: "primary", onclick: send }, "Send");
    this.body.replaceChildren(field);
    this.foot.replaceChildren(el("div", { class: "actions editing" }, cancel, save));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

function tookText(figures) {
  const tokens = `${figures.completion_tokens} token${figures.completion_tokens === 1 ? "" : "s"}`;
  const parts = [tokens];
  if (figures.decode_tokens_per_s) parts.push(`${speed(figures.decode_tokens_per_s)} tokens/s`);
  parts.push(`first after ${seconds(figures.time_to_first_token_s)}`);
  return parts.join(" · ");
}

export class Transcript {
  /** `actions`: retry, resend, enterKey, startNew, focusComposer, redraw. */
  constructor(actions) {
    this.root = byId("transcript");
    this.scroller = byId("scroller");
    this.latest = byId("latest");
    this.actions = actions;
    this.views = new Map();
    this.frame = null;
    this.follows = true;
    this.scroller.addEventListener("scroll", () => this.noteScroll(), { passive: true });
    this.latest.addEventListener("click", () => this.scrollToEnd());
  }

  /** Show a conversation whole, or what changed in it. */
  show(conversation, busy) {
    const changed = this.shown !== conversation.id;
    if (changed) {
      this.views.clear();
      this.shown = conversation.id;
    }
    const { messages } = conversation;
    const lastQuestion = messages.findLast(({ role }) => role === "user");
    const wanted = [];
    let model = null;
    for (const message of messages) {
      if (message.role === "assistant") {
        if (model && message.model !== model) wanted.push(this.marker(message));
        model = message.model;
      }
      let view = this.views.get(message.id);
      if (view?.message !== message) view = new MessageView(message, this.actions);
      this.views.set(message.id, view);
      view.update({ isLast: message === messages.at(-1), isLastQuestion: message === lastQuestion, busy });
      wanted.push(view.element);
    }
    if (model && conversation.model !== model && !busy) {
      wanted.push(el("p", { class: "marker" }, el("span", {}, `From here on: ${conversation.model}`)));
    }
    this.place(wanted);
    if (!messages.length) {
      this.scroller.scrollTop = 0;
      this.noteScroll();
      this.follows = true;
    } else if (changed) this.scrollToEnd();
    else this.follow();
  }

  /** A line where another model goes on; it stands before the question that it answers. */
  marker(message) {
    return el("p", { class: "marker" }, el("span", {}, `From here on: ${message.model}`));
  }

  place(wanted) {
    // A marker belongs above the question, not between it and its answer.
    for (let at = 1; at < wanted.length; at += 1) {
      if (wanted[at].className === "marker" && wanted[at - 1].classList.contains("user")) {
        [wanted[at - 1], wanted[at]] = [wanted[at], wanted[at - 1]];
      }
    }
    const same =
      wanted.length === this.root.children.length &&
      wanted.every((node, at) => node === this.root.children[at]);
    if (!same) this.root.replaceChildren(...wanted);
  }

  /** Draw a growing answer, once a frame at most. */
  grow(message) {
    if (this.frame !== null) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.views.get(message.id)?.updateText();
      this.follow();
    });
  }

  noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < 80;
    this.latest.hidden = this.follows || !this.views.size;
  }

  follow() {
    if (this.follows && this.views.size) this.scrollToEnd();
    else this.noteScroll();
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.noteScroll();
  }

  /** Edit the last question, as its button does. */
  editLast(message) {
    this.views.get(message.id)?.edit();
  }
}
