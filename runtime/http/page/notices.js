/** Short messages at the edge of the page, and words for those who listen instead of look. */

import { byId, el, iconButton } from "./dom.js";

const SHOWN_MS = 8000;

/** Show `text` for a while, with a button if `action` ({label, run}) is given. Returns a closer. */
export function notify(text, action = null) {
  const close = () => {
    clearTimeout(timer);
    line.remove();
  };
  const line = el("div", { class: "notice" }, el("span", {}, text));
  if (action) {
    const run = () => {
      close();
      action.run();
    };
    line.append(el("button", { type: "button", class: "text-button", onclick: run }, action.label));
  }
  line.append(iconButton("close", "Dismiss", close));
  let timer = setTimeout(close, SHOWN_MS);
  // Whoever reads it or is about to press its button is not hurried.
  const hold = () => clearTimeout(timer);
  const release = () => {
    clearTimeout(timer);
    timer = setTimeout(close, SHOWN_MS);
  };
  for (const event of ["pointerenter", "focusin"]) line.addEventListener(event, hold);
  for (const event of ["pointerleave", "focusout"]) line.addEventListener(event, release);
  byId("notices").append(line);
  return close;
}

/** Say something to screen readers, once. */
export function announce(text) {
  byId("announcer").textContent = text;
}
