/**
 * The two columns beside the chat. On a wide page they stand beside it and stay as a person left
 * them; on a narrow one they lie over it and go away with Esc or a touch beside them.
 */

import { byId } from "./dom.js";

const KEPT = "privatelora.drawers";
const WIDE = { sidebar: "(min-width: 800px)", figures: "(min-width: 1180px)" };

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

class Drawer {
  constructor(name) {
    this.name = name;
    this.element = byId(name);
    this.buttons = document.querySelectorAll(`[data-toggle="${name}"]`);
    this.opener = document.querySelector(`main [data-toggle="${name}"]`);
    this.media = window.matchMedia(WIDE[name]);
    this.listeners = [];
    for (const button of this.buttons) button.addEventListener("click", () => this.toggle());
    this.media.addEventListener("change", () => this.arrange());
    this.arrange();
  }

  get wide() {
    return this.media.matches;
  }

  get overlays() {
    return this.isOpen && !this.wide;
  }

  arrange() {
    this.set(this.wide && kept()[this.name] !== false);
  }

  toggle() {
    this.set(!this.isOpen);
    if (this.wide) {
      try {
        localStorage.setItem(KEPT, JSON.stringify({ ...kept(), [this.name]: this.isOpen }));
      } catch {
        // Open as usual next time.
      }
    }
    if (this.overlays) this.element.querySelector("button, a").focus();
    else if (!this.isOpen) this.opener.focus();
  }

  /** Close if it lies over the chat; whether it did. */
  dismiss() {
    if (!this.overlays) return false;
    this.toggle();
    return true;
  }

  /** As `dismiss`, but leaves the focus alone. */
  putAway() {
    if (this.overlays) this.set(false);
  }

  set(open) {
    this.isOpen = open;
    this.element.classList.toggle("open", open);
    this.element.inert = !open;
    for (const button of this.buttons) button.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle(`with-${this.name}`, open);
    for (const listener of this.listeners) listener();
    // What lies under a drawer is out of reach until it is closed.
    document.querySelector("main").inert = drawers.some((drawer) => drawer.overlays);
  }
}

const drawers = [];
drawers.push(new Drawer("sidebar"), new Drawer("figures"));
export const [sidebar, figuresDrawer] = drawers;

/** Close what lies over the chat; whether anything did. */
export const dismissDrawers = () => drawers.map((drawer) => drawer.dismiss()).some(Boolean);

byId("scrim").addEventListener("click", dismissDrawers);
