/** A conversation as data: made, titled, sent and exported. No DOM, no storage. */

/**
 * @typedef {object} Message
 * @property {string} id
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [model]  which model answered
 * @property {"streaming" | "done" | "length" | "stopped" | "interrupted" | "failed"} [state]
 * @property {{kind: string, message: string}} [error]  why it failed
 * @property {object} [figures]  what the answer took
 * @property {Message} [previous]  the answer it replaces, until its first words are there
 */

/** Settings of a conversation; what is null is the edge's default. */
export const NO_SETTINGS = Object.freeze({
  system: "",
  temperature: null,
  max_tokens: null,
  seed: null,
});

const TITLE_LENGTH = 48;

/** Random, and short enough for an address. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

export function newConversation(model, settings) {
  return {
    id: newId(),
    title: "",
    renamed: false,
    created: Date.now(),
    updated: Date.now(),
    model,
    settings: { ...NO_SETTINGS, ...settings },
    messages: [],
  };
}

/** The first words of the first message. */
export function titleFrom(text) {
  const line = text.trim().replace(/\s+/g, " ");
  if (line.length <= TITLE_LENGTH) return line;
  const cut = line.slice(0, TITLE_LENGTH);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), TITLE_LENGTH / 2)).trimEnd()}…`;
}

export const titleOf = (conversation) => conversation.title || "New conversation";

/** Add a person's message and an empty answer to it, which is returned. */
export function addTurn(conversation, text) {
  conversation.messages.push({ id: newId(), role: "user", content: text });
  if (!conversation.renamed && !conversation.title) conversation.title = titleFrom(text);
  return addAnswer(conversation);
}

export function addAnswer(conversation) {
  const answer = {
    id: newId(),
    role: "assistant",
    content: "",
    model: conversation.model,
    state: "streaming",
  };
  conversation.messages.push(answer);
  return answer;
}

export const lastOf = (conversation, role) =>
  conversation.messages.findLast((message) => message.role === role);

/**
 * What to ask of the edge for `answer`, the last message. Answers that brought no text are left
 * out, and questions that then stand together are joined: chat templates want turns that alternate.
 */
export function requestFor(conversation, answer) {
  const { system, ...sampling } = conversation.settings;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { id, role, content } of conversation.messages) {
    if (id === answer.id) break;
    if (!content) continue;
    const last = messages.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  const chosen = Object.entries(sampling).filter(([, value]) => value !== null);
  return { model: conversation.model ?? undefined, messages, ...Object.fromEntries(chosen) };
}

/** Bring what was read from storage into shape; null if it is no conversation. */
export function restored(data) {
  if (typeof data?.id !== "string" || !Array.isArray(data.messages)) return null;
  const messages = data.messages
    .filter(
      (message) =>
        typeof message?.content === "string" && ["user", "assistant"].includes(message.role),
    )
    .map(({ previous, ...message }) => (previous && !message.content ? previous : message));
  for (const message of messages) {
    message.id ??= newId();
    // The page that was reading this answer is gone.
    if (message.state === "streaming") message.state = "interrupted";
  }
  return { ...newConversation(null), ...data, settings: { ...NO_SETTINGS, ...data.settings }, messages };
}

/** A file of all there is. */
export const asJson = (conversation) => `${JSON.stringify(conversation, null, 2)}\n`;

/** A file to read. */
export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.settings.system.trim()) {
    parts.push(`## System\n\n${conversation.settings.system.trim()}`);
  }
  for (const { role, content, model } of conversation.messages) {
    const who = role === "user" ? "You" : model ? `Answer (${model})` : "Answer";
    parts.push(`## ${who}\n\n${content.trim()}`);
  }
  return `${parts.join("\n\n")}\n`;
}

/** A name for a file, from the title. */
export function fileName(conversation, extension) {
  const name = titleOf(conversation)
    .normalize("NFKD")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .toLowerCase();
  return `${name || "conversation"}.${extension}`;
}
