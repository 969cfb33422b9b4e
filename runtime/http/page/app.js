/** The chat page: puts its parts together and decides what follows from what. */

import { Answers } from "./answers.js";
import { getModels, getSent, getStatus } from "./api.js";
import { Composer } from "./composer.js";
import * as talk from "./conversation.js";
import { askKey, editSettings } from "./dialogs.js";
import { byId, download, fillIcons } from "./dom.js";
import { dismissDrawers, figuresDrawer, sidebar } from "./drawers.js";
import { EXAMPLES } from "./examples.js";
import { showFigures, showLink } from "./figures.js";
import { announce, notify } from "./notices.js";
import { Poll } from "./poll.js";
import { SentView } from "./sent.js";
import { ConversationList } from "./sidebar.js";
import * as store from "./store.js";
import { Transcript } from "./transcript.js";

const STATUS_EVERY_MS = 10_000;
const SENT_EVERY_MS = 1000;

let current = null;
let models = [];
let status = null;
let saveProblem = null;

fillIcons();

const answers = new Answers({ grown, ended, save });
const composer = new Composer({ send, stop: stopAnswer, chooseModel, editLast });
const list = new ConversationList({ rename, remove });
const transcript = new Transcript({
  retry,
  resend,
  enterKey,
  startNew,
  redraw: draw,
  focusComposer: () => composer.focus(),
});
const sent = new SentView();
const statusPoll = new Poll(askStatus, () => STATUS_EVERY_MS);
const sentPoll = new Poll(askSent, () =>
  figuresDrawer.isOpen && answers.anyBusy ? SENT_EVERY_MS : null,
);

// Drawing

/** Show everything as it is now. */
function draw() {
  const busy = answers.isBusy(current.id);
  list.show(store.list(), current.id, answers.isBusy);
  byId("title").textContent = talk.titleOf(current);
  document.title = current.title ? `${current.title} · PrivateLoRA` : "PrivateLoRA";
  byId("empty").hidden = current.messages.length > 0;
  byId("more").hidden = current.messages.length === 0;
  byId("edge-model").textContent = current.model ?? "";
  composer.show({ models, model: current.model, busy });
  transcript.show(current, busy);
  drawFigures();
}

function drawFigures() {
  showFigures(talk.lastOf(current, "assistant")?.figures, status?.max_positions);
}

// Conversations

function select(conversation) {
  if (current) store.setDraft(draftKey(), composer.text);
  current = conversation;
  composer.text = store.draft(draftKey());
  draw();
}

/** Drafts of conversations that are not stored yet share a place. */
const draftKey = () => (current.messages.length ? current.id : "new");

function startNew() {
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  const { model, settings } = store.defaults();
  select(talk.newConversation(models.includes(model) ? model : (models[0] ?? null), settings));
  sidebar.putAway();
  composer.focus();
}

/** Open what the address names; a new conversation if it names none. */
function followAddress() {
  const id = /^#c-(\w+)$/.exec(location.hash)?.[1];
  const conversation = id ? store.get(id) : null;
  if (!conversation) {
    startNew();
    return;
  }
  if (conversation !== current) select(conversation);
  sidebar.putAway();
}

function save(conversation) {
  const problem = store.save(conversation);
  const gone = store.trim(new Set([current.id, ...answers.conversations().map(({ id }) => id)]));
  for (const old of gone) {
    notify(`${store.MAX_CONVERSATIONS} conversations are kept; the oldest, “${talk.titleOf(old)}”, made room.`, {
      label: "Export it",
      run: () => exportJson(old),
    });
  }
  if (problem === saveProblem) return;
  saveProblem = problem;
  if (!problem) return;
  const why = problem === "full" ? "this browser's storage is full" : "this browser keeps nothing";
  notify(`Not stored: ${why}. The conversation lasts as long as this page.`, {
    label: "Export it",
    run: () => exportJson(conversation),
  });
}

function rename(id, title) {
  const conversation = store.get(id);
  if (conversation && title) {
    conversation.title = title;
    conversation.renamed = true;
    save(conversation);
  }
  draw();
}

function remove(id) {
  const conversation = store.get(id);
  if (!conversation) return;
  answers.stop(id);
  store.remove(id);
  const wasCurrent = conversation === current;
  if (wasCurrent) startNew();
  else draw();
  notify(`Deleted “${talk.titleOf(conversation)}”.`, {
    label: "Undo",
    run: () => {
      save(conversation);
      if (wasCurrent) location.hash = `#c-${id}`;
      draw();
    },
  });
}

const exportJson = (conversation) =>
  download(talk.fileName(conversation, "json"), talk.asJson(conversation), "application/json");
const exportMarkdown = (conversation) =>
  download(talk.fileName(conversation, "md"), talk.asMarkdown(conversation), "text/markdown");

// Asking and answering

function send(text) {
  if (answers.isBusy(current.id)) return false;
  const isNew = current.messages.length === 0;
  if (isNew) store.setDraft(draftKey(), "");
  ask(talk.addTurn(current, text));
  if (isNew) history.pushState(null, "", `#c-${current.id}`);
  store.setDraft(draftKey(), "");
  return true;
}

function ask(answer) {
  const conversation = current;
  conversation.updated = Date.now();
  answers.run(conversation, answer);
  save(conversation);
  draw();
  transcript.scrollToEnd();
  announce("Answering");
  sentPoll.now();
}

/** Ask for the last answer once more. The old one comes back if nothing takes its place. */
function retry() {
  if (answers.isBusy(current.id)) return;
  const old = current.messages.pop();
  const answer = talk.addAnswer(current);
  if (old.content) answer.previous = old;
  ask(answer);
  composer.focus();
}

/** Ask a changed question; what followed the old one goes. */
function resend(message, text) {
  if (answers.isBusy(current.id)) return;
  current.messages.length = current.messages.indexOf(message);
  ask(talk.addTurn(current, text));
  composer.focus();
}

function editLast() {
  const question = talk.lastOf(current, "user");
  if (!question || answers.isBusy(current.id)) return false;
  transcript.editLast(question);
  return true;
}

function stopAnswer() {
  answers.stop(current.id);
}

function grown(conversation, answer) {
  if (answer.content) delete answer.previous;
  if (conversation !== current) return;
  transcript.grow(answer);
  drawFigures();
}

function ended(conversation, answer) {
  if (answer.previous) {
    const { previous } = answer;
    delete answer.previous;
    conversation.messages[conversation.messages.indexOf(answer)] = {
      ...previous,
      error: answer.error,
    };
  }
  // Deleted meanwhile: it stays so.
  if (store.get(conversation.id)) save(conversation);
  draw();
  if (conversation === current) announce(spoken(answer));
  if (answer.error?.kind === "key") enterKey();
  if (answer.error) statusPoll.now();
  sentPoll.now();
}

function spoken(answer) {
  if (answer.error) return `The answer failed. ${answer.error.message}`;
  if (answer.state === "stopped") return "Answer stopped.";
  return `Answer: ${answer.content}`;
}

function chooseModel(model) {
  current.model = model;
  if (current.messages.length) save(current);
  else store.setDefaults({ ...store.defaults(), model });
  draw();
  announce(`${model} answers from here on`);
}

async function changeSettings() {
  const conversation = current;
  const changed = await editSettings(conversation.settings);
  if (!changed) return;
  conversation.settings = changed.settings;
  if (conversation.messages.length) save(conversation);
  if (changed.asDefault) {
    store.setDefaults({ model: conversation.model, settings: changed.settings });
  }
  composer.focus();
}

// The edge

async function enterKey() {
  if (!(await askKey())) return;
  statusPoll.now();
  const known = await loadModels();
  if (known && current.messages.at(-1)?.error?.kind === "key") retry();
}

/** Learn which models there are; whether the edge answered. */
async function loadModels() {
  try {
    models = await getModels();
  } catch (error) {
    if (error.kind === "key") enterKey();
    return false;
  }
  if (current.messages.length === 0 || !current.model) {
    const { model } = store.defaults();
    if (!models.includes(current.model)) current.model = models.includes(model) ? model : models[0];
  }
  draw();
  return true;
}

async function askStatus() {
  try {
    status = await getStatus();
  } catch (error) {
    status = null;
    showLink(null, error);
    throw error;
  }
  showLink(status, null);
  drawFigures();
  // Other programs use this edge too.
  sentPoll.now();
  if (!models.length) await loadModels();
}

async function askSent() {
  if (!figuresDrawer.isOpen) return;
  if (!sent.take(await getSent(sent.after))) sent.take(await getSent(sent.after));
}

// Wiring

byId("edge-address").textContent = location.host;
byId("new").addEventListener("click", startNew);
byId("theme").addEventListener("click", () => announce(`${window.toggleTheme()} theme`));
byId("open-settings").addEventListener("click", changeSettings);
for (const [id, action] of Object.entries({
  rename: () => {
    if (!sidebar.isOpen) sidebar.toggle();
    list.rename(current);
  },
  delete: () => remove(current.id),
  "export-markdown": () => exportMarkdown(current),
  "export-json": () => exportJson(current),
})) {
  byId(id).addEventListener("click", () => {
    byId("menu").hidePopover();
    action();
  });
}
for (const example of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.addEventListener("click", () => {
    send(example);
    composer.focus();
  });
  byId("examples").append(button);
}
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("message").focus();
});
figuresDrawer.listeners.push(() => sentPoll.now());

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && key === "o") {
    event.preventDefault();
    startNew();
  } else if (key === "escape" && !event.defaultPrevented && !event.isComposing) {
    if (document.querySelector("dialog[open], :popover-open")) return;
    if (!dismissDrawers()) stopAnswer();
  }
});
window.addEventListener("hashchange", followAddress);
window.addEventListener("pagehide", () => {
  store.setDraft(draftKey(), composer.text);
  answers.leave();
});
// Another window of this browser changed a conversation.
window.addEventListener("storage", (event) => {
  const id = event.key?.slice(event.key.lastIndexOf(".") + 1);
  if (answers.isBusy(id)) return;
  if (store.reread(event.key) === current.id) current = store.get(id) ?? current;
  draw();
});

store.load();
followAddress();
loadModels();
statusPoll.now();
sentPoll.now();
