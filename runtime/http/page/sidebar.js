/** The list of conversations: open, rename, delete. */

import { titleOf } from "./conversation.js";
import { byId, el, iconButton } from "./dom.js";

export class ConversationList {
  /** `actions`: open(id), rename(id, title), remove(id). */
  constructor(actions) {
    this.root = byId("conversations");
    this.actions = actions;
    this.renaming = null;
  }

  show(conversations, currentId, isBusy) {
    if (this.renaming) return; // drawn again when the name is given
    const focused = this.root.contains(document.activeElement)
      ? [document.activeElement.closest("li")?.dataset.id, document.activeElement.className]
      : null;
    this.root.replaceChildren(
      ...conversations.map((conversation) =>
        this.item(conversation, conversation.id === currentId, isBusy(conversation.id)),
      ),
    );
    if (!focused) return;
    const item = [...this.root.children].find(({ dataset }) => dataset.id === focused[0]);
    item?.querySelector(`[class="${focused[1]}"]`)?.focus();
  }

  item(conversation, isCurrent, busy) {
    const title = titleOf(conversation);
    const link = el(
      "a",
      { href: `#c-${conversation.id}`, class: "entry", "aria-current": isCurrent ? "page" : null },
      busy ? el("span", { class: "busy", role: "img", "aria-label": "Answering" }) : null,
      el("span", { class: "entry-title" }, title),
    );
    return el(
      "li",
      { "data-id": conversation.id },
      link,
      iconButton("edit", `Rename “${title}”`, () => this.rename(conversation), {
        class: "icon-button small rename",
      }),
      iconButton("trash", `Delete “${title}”`, () => this.actions.remove(conversation.id), {
        class: "icon-button small delete",
      }),
    );
  }

  /** Put a field in the place of a title. */
  rename(conversation) {
    const item = [...this.root.children].find(({ dataset }) => dataset.id === conversation.id);
    if (!item) return;
    this.renaming = conversation.id;
    const field = el("input", { class: "rename-field", "aria-label": "New name", maxlength: "120" });
    field.value = titleOf(conversation);
    const finish = (keep) => {
      if (this.renaming !== conversation.id) return;
      this.renaming = null;
      this.actions.rename(conversation.id, keep ? field.value.trim() : "");
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      finish(event.key === "Enter");
    });
    field.addEventListener("blur", () => finish(true));
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}
