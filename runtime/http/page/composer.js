/** The field for messages, with the choice of model and the buttons beside it. */

import { byId, el } from "./dom.js";

export class Composer {
  /** `actions`: send(text) whether it was taken, stop(), chooseModel(name), editLast(). */
  constructor(actions) {
    this.actions = actions;
    this.field = byId("message");
    this.model = byId("model");
    this.touch = window.matchMedia("(hover: none) and (pointer: coarse)");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("stop").addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
    this.model.addEventListener("change", () => actions.chooseModel(this.model.value));
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => this.onKey(event));
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    this.fit();
  }

  /** Go on writing, unless that brings up a keyboard on the screen. */
  focus() {
    if (!this.touch.matches) this.field.focus();
  }

  onKey(event) {
    if (event.isComposing) return;
    // On a touch keyboard, Enter is the only way to a new line.
    if (event.key === "Enter" && !event.shiftKey && !this.touch.matches) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && !this.text && this.actions.editLast()) {
      event.preventDefault();
    }
  }

  submit() {
    const text = this.text.trim();
    if (!text || !this.actions.send(text)) return;
    this.text = "";
  }

  /** As high as its text, up to a third of the page; then it scrolls. */
  fit() {
    this.field.style.setProperty("height", "auto");
    this.field.style.setProperty("height", `${this.field.scrollHeight}px`);
    byId("send").disabled = !this.text.trim();
  }

  /** `model` is listed even if the edge does not offer it any more: the conversation names it. */
  show({ models, model, busy }) {
    const names = model && !models.includes(model) ? [...models, model] : models;
    const shown = Array.from(this.model.options, (option) => option.value);
    if (names.join("\n") !== shown.join("\n")) {
      this.model.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    }
    if (model) this.model.value = model;
    this.model.disabled = names.length < 2;
    this.model.hidden = names.length === 0;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
  }
}
