/** Builds elements. What a model wrote only ever becomes text nodes, never markup. */

const SVG = "http://www.w3.org/2000/svg";

/** Outlines on a square of 24. */
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  close: "M6 6l12 12M18 6L6 18",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  sliders: "M4 8h9M17 8h3M15 5.500v5M4 16h3M11 16h9M9 13.500v5",
  pulse: "M3 12h4l3-7 4 14 3-7h4",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 13l4 4L19 7",
  retry: "M19 12a7 7 0 1 1-2.2-5.100M19 4v4h-4",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  theme: "M12 4a8 8 0 1 0 0 16a8 8 0 0 0 0-16zM12 6v12a6 6 0 0 1 0-12z",
  chevron: "M7 10l5 5 5-5",
  down: "M12 5v14M6 13l6 6 6-6",
  key: "M14 10a4 4 0 1 1-1.2-2.800A4 4 0 0 1 14 10zM14 10h7v4M18 10v3",
  device: "M8 3h8v18H8zM11 18h2",
  cloud: "M7 18h10a4 4 0 0 0 .5-7.97A6 6 0 0 0 6.1 11.6 3.3 3.3 0 0 0 7 18z",
};

/**
 * An element. Properties that are functions become listeners ("onclick"), true and false switch
 * an attribute, null leaves it away, `class` and the others are attributes.
 */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(key, value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A picture for a button; the button's label names it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({
    viewBox: "0 0 24 24",
    class: `icon icon-${name}`,
    "aria-hidden": "true",
    focusable: "false",
  })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows only a picture; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  return el(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...properties },
    icon(name),
  );
}

/** Put pictures into the page's own buttons: every element with `data-icon`. */
export function fillIcons() {
  for (const place of document.querySelectorAll("[data-icon]")) {
    place.replaceWith(icon(place.dataset.icon));
  }
}

export const byId = (id) => document.getElementById(id);

/** Copy text; works without a secure context too. Returns whether it did. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not allowed here; the older way may be.
    }
  }
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

/** A button that copies `text()` and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "quiet" }, icon("copy"), label);
  button.addEventListener("click", async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "check" : "close"), copied ? "Copied" : "Not allowed");
    setTimeout(() => button.replaceChildren(icon("copy"), label), 1600);
  });
  return button;
}

/** Hand a file to the person. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
