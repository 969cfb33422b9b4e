/**
 * Conversations kept in this browser, one entry of localStorage each. At most MAX_CONVERSATIONS;
 * what does not fit the browser's quota stays usable in this page, and `save` says so.
 */

import { restored } from "./conversation.js";

const PREFIX = "privatelora.conversation.";
const DEFAULTS = "privatelora.defaults";
const DRAFT = "privatelora.draft.";
export const MAX_CONVERSATIONS = 100;

/** By id. Holds everything, also what storage refused. */
const conversations = new Map();

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Read everything; entries that are damaged are passed over and left alone. */
export function load() {
  conversations.clear();
  try {
    for (const key of Object.keys(localStorage)) {
      if (!key.startsWith(PREFIX)) continue;
      const conversation = restored(parse(localStorage.getItem(key)));
      if (conversation) conversations.set(conversation.id, conversation);
    }
  } catch {
    // Storage is blocked; saving says so.
  }
}

/** Read one again that another window changed; its id, or null if the change concerns none. */
export function reread(key) {
  if (!key?.startsWith(PREFIX)) return null;
  const id = key.slice(PREFIX.length);
  const conversation = restored(parse(localStorage.getItem(key)));
  if (conversation) conversations.set(id, conversation);
  else conversations.delete(id);
  return id;
}

export const get = (id) => conversations.get(id) ?? null;

/** All, the latest first. */
export const list = () => [...conversations.values()].sort((a, b) => b.updated - a.updated);

/**
 * Keep a conversation. Returns null, or why it could not be stored: "full" or "blocked"; it is
 * then kept as long as the page.
 */
export function save(conversation) {
  conversations.set(conversation.id, conversation);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return null;
  } catch (error) {
    return error.name === "QuotaExceededError" ? "full" : "blocked";
  }
}

export function remove(id) {
  conversations.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // It was never stored.
  }
}

/** Take away the oldest beyond the bound, never those in `keep`; returns them. */
export function trim(keep) {
  const surplus = conversations.size - MAX_CONVERSATIONS;
  if (surplus <= 0) return [];
  const oldest = list()
    .filter(({ id }) => !keep.has(id))
    .slice(-surplus);
  oldest.forEach(({ id }) => remove(id));
  return oldest;
}

/** Model and settings that new conversations begin with. */
export function defaults() {
  try {
    return parse(localStorage.getItem(DEFAULTS)) ?? {};
  } catch {
    return {};
  }
}

export function setDefaults(values) {
  try {
    localStorage.setItem(DEFAULTS, JSON.stringify(values));
    return true;
  } catch {
    return false;
  }
}

/** What was typed and not sent, per conversation and window. */
export function draft(id) {
  try {
    return sessionStorage.getItem(DRAFT + id) ?? "";
  } catch {
    return "";
  }
}

export function setDraft(id, text) {
  try {
    if (text) sessionStorage.setItem(DRAFT + id, text);
    else sessionStorage.removeItem(DRAFT + id);
  } catch {
    // Lost with the page, no sooner.
  }
}
