/** The two dialogues: settings of a conversation, and the API key. */

import { apiKey, setApiKey } from "./api.js";
import { byId } from "./dom.js";

/** Open a dialogue; the value of the button that closes it ("" for Esc). */
function opened(dialog) {
  dialog.showModal();
  return new Promise((resolve) => {
    const heard = new AbortController();
    const close = (value) => {
      heard.abort();
      resolve(value);
    };
    const { signal } = heard;
    // "close" comes some time after the dialogue is gone, "submit" at once.
    dialog.addEventListener("submit", (event) => close(event.submitter?.value ?? "save"), { signal });
    dialog.addEventListener("close", () => close(""), { signal });
  });
}

const FIELDS = { temperature: "set-temperature", max_tokens: "set-max-tokens", seed: "set-seed" };

/** Let a person change settings; {settings, asDefault}, or null if nothing was saved. */
export async function editSettings(settings) {
  byId("set-system").value = settings.system;
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = settings[name] ?? "";
  byId("set-default").checked = false;
  byId("key-kept").hidden = apiKey() === null;
  byId("forget-key").onclick = () => {
    setApiKey(null);
    byId("key-kept").hidden = true;
  };
  if ((await opened(byId("settings"))) !== "save") return null;
  const changed = { system: byId("set-system").value.trim() };
  for (const [name, id] of Object.entries(FIELDS)) {
    const value = byId(id).valueAsNumber;
    changed[name] = Number.isNaN(value) ? null : value;
  }
  return { settings: changed, asDefault: byId("set-default").checked };
}

let asking = null;

/** Ask for the API key and keep it; whether one was given. Several askers share one dialogue. */
export function askKey() {
  asking ??= (async () => {
    const problem = byId("key-problem");
    problem.hidden = apiKey() === null;
    problem.textContent = "The edge did not accept the key that this browser keeps.";
    byId("key-input").value = "";
    const answer = await opened(byId("key"));
    asking = null;
    const key = byId("key-input").value.trim();
    byId("key-input").value = "";
    if (answer !== "save" || !key) return false;
    setApiKey(key);
    return true;
  })();
  return asking;
}
