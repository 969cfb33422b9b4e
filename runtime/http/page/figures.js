/** Figures beside the chat: what an answer takes, and the link to the cloud. */

import { byId, el } from "./dom.js";
import { bytes, milliseconds, seconds, speed, whole } from "./numbers.js";

const EMPTY = "–";

function tile(label, value, unit) {
  return el(
    "div",
    {},
    el("dt", {}, label),
    el("dd", {}, value, unit && value !== EMPTY ? el("small", {}, unit) : null),
  );
}

/** Show what an answer took or takes; null for none. `maxPositions`: the context, if known. */
export function showFigures(figures, maxPositions) {
  const known = figures ?? {};
  const show = (value, text) => (value ? text(value) : EMPTY);
  const perToken = (value) => (known.completion_tokens > 1 ? show(value, bytes) : EMPTY);
  const trips = known.completion_tokens > 1 ? show(known.round_trips_per_token, speed) : EMPTY;
  byId("answer-figures").replaceChildren(
    tile("Speed", show(known.decode_tokens_per_s, speed), "tokens/s"),
    tile("First token", show(known.time_to_first_token_s, seconds)),
    tile("Round trips", trips.replace(/\.0$/, ""), "/token"),
    tile("Tokens", show(known.completion_tokens, whole)),
    tile("To the cloud", perToken(known.bytes_to_cloud_per_token), "/token"),
    tile("From the cloud", perToken(known.bytes_from_cloud_per_token), "/token"),
  );
  const used = (known.prompt_tokens ?? 0) + (known.completion_tokens ?? 0);
  const context = byId("context");
  context.hidden = !used || !maxPositions;
  if (context.hidden) return;
  byId("context-text").textContent = `${whole(used)} of ${whole(maxPositions)} tokens`;
  byId("context-bar").value = used / maxPositions;
}

/** Show the state of the link; `problem` if the edge itself could not be asked. */
export function showLink(status, problem) {
  const pill = byId("link-pill");
  const say = (state, text) => {
    pill.dataset.state = state;
    byId("link-text").textContent = text;
  };
  const facts = [];
  const fact = (name, value, style = null) => facts.push(el("dt", {}, name), el("dd", { class: style }, value));
  if (problem) {
    const named = { key: "API key wanted", edge: "Edge not running" };
    say("away", named[problem.kind] ?? "Edge in trouble");
    fact("Edge", problem.message);
  } else if (status) {
    const rtt = Number.isFinite(status.rtt_ms) ? milliseconds(status.rtt_ms) : null;
    if (status.connected) say("connected", rtt ? `Cloud connected, ${rtt}` : "Cloud connected");
    else say("away", "Cloud away");
    fact("Cloud", status.cloud, "mono");
    fact("State", status.connected ? "connected" : (status.problem ?? "not connected"));
    if (status.connected) fact("Round trip now", rtt ?? EMPTY);
    if (status.software) fact("It runs", status.software);
    fact("Caches", `${status.open_conversations} open, ${status.busy_conversations} busy`);
    byId("cloud-address").textContent = status.cloud;
  }
  byId("link-figures").replaceChildren(...facts);
}
