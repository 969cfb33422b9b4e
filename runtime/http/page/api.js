/** What the edge offers over HTTP. Every failure leaves here as an ApiError with a kind. */

const KEY = "privatelora.key";
const V1 = new URL("v1/", document.baseURI);

let keyInMemory = null;

/** The API key this browser keeps, or null. */
export function apiKey() {
  try {
    return localStorage.getItem(KEY) ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}

/** Keep an API key in this browser; null forgets it. */
export function setApiKey(key) {
  keyInMemory = key;
  try {
    if (key === null) localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, key);
  } catch {
    // Storage is blocked: the key lasts as long as the page.
  }
}

/**
 * kind: "key" (missing or refused), "cloud" (not reachable), "edge" (not running), "too-long",
 * "busy", "model" (unknown), "cut" (the answer ended early), or "other".
 */
export class ApiError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const KINDS = {
  context_length_exceeded: "too-long",
  model_not_found: "model",
  rate_limit_exceeded: "busy",
  cloud_unreachable: "cloud",
  cloud_timeout: "cloud",
  shutting_down: "edge",
};

/** By the error's code, which an error inside a stream has too, or else by the status. */
function kindOf(status, code) {
  if (KINDS[code]) return KINDS[code];
  if (status === 401) return "key";
  if (status === 413) return "too-long";
  return status === 429 ? "busy" : "other";
}

function errorOf(status, body) {
  const error = body?.error ?? body ?? {};
  return new ApiError(
    kindOf(status, error.code),
    error.message ?? `The edge answered with status ${status}.`,
  );
}

async function request(path, options = {}) {
  const key = apiKey();
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, V1), { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("edge", "Nothing answers at this address.");
  }
  if (!response.ok) throw errorOf(response.status, await response.json().catch(() => null));
  return response;
}

async function getJson(path) {
  const response = await request(path);
  try {
    return await response.json();
  } catch {
    throw new ApiError("cut", "The edge's answer ended early.");
  }
}

/** Names of the models on offer; the default first. */
export async function getModels() {
  return (await getJson("models")).data.map((model) => model.id);
}

/** The state of the edge and its link to the cloud. */
export const getStatus = () => getJson("privatelora/status");

/** What the cloud received: totals by kind, and messages with a number above `after`. */
export const getSent = (after) => getJson(`privatelora/sent?after=${after}`);

/** Data of the server-sent events in `body`, one string each. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/**
 * The chunks of an answer as they come. Aborting `signal` stops it: AbortError. An answer that
 * ends without saying so raises ApiError "cut".
 */
export async function* streamChat(body, signal) {
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(200, chunk);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("cut", "The connection to the edge broke in the middle of the answer.");
  }
  throw new ApiError("cut", "The answer ended early.");
}
