// The server's endpoints, as the page calls them. What goes wrong is a ServerError, whose message is for people.

export class ServerError extends Error {
  // status: of the response; 0 if there was none
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached. It may be restarting, or this device may be offline.";
const BROKEN_OFF = "The connection to the server broke off before the answer was complete.";

export class Api {
  // settings: a function that returns { key, salt }
  constructor(settings) {
    this.settings = settings;
  }

  async json(path, options = {}) {
    const response = await this.fetch(path, options);
    return orThrow(response.json(), BROKEN_OFF);
  }

  async fetch(path, options) {
    const { key } = this.settings();
    const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await orThrow(fetch(path, { ...options, headers }), UNREACHABLE);
    if (!response.ok) throw new ServerError(await messageOf(response), response.status);
    return response;
  }

  model() {
    return this.json("v1/models").then((models) => models.data[0]);
  }

  store() {
    return this.json("v1/store");
  }

  notes() {
    return this.json(`v1/knowledge${this.salted()}`).then((list) => list.data);
  }

  remember(text) {
    const body = { text, ...this.saltField() };
    return this.json("v1/knowledge", { method: "POST", body: JSON.stringify(body) });
  }

  forget(handle) {
    return this.json(`v1/knowledge/${handle}${this.salted()}`, { method: "DELETE" });
  }

  salted() {
    const { salt } = this.settings();
    return salt ? `?cache_salt=${encodeURIComponent(salt)}` : "";
  }

  saltField() {
    const { salt } = this.settings();
    return salt ? { cache_salt: salt } : {};
  }

  // Has the server keep the KV of messages, without an answer.
  prefill(messages, signal) {
    const body = { messages, ...this.saltField(), max_tokens: 0, add_generation_prompt: false };
    return this.json("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  }

  // Yields the chunks of an answer while they come. Throws if the last one does not come.
  async *chat(request, signal) {
    const body = {
      ...request, ...this.saltField(), stream: true, return_token_map: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    const response = await this.fetch("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = await orThrow(parse(data), BROKEN_OFF);
      if (chunk.error) throw new ServerError(sentence(chunk.error.message), 200);
      yield chunk;
    }
    throw new ServerError(BROKEN_OFF);
  }
}

// Browsers say "Failed to fetch" or "network error", each in other words.
async function orThrow(promise, message) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(message);
  }
}

async function parse(data) {
  return JSON.parse(data);
}

async function messageOf(response) {
  const after = response.headers.get("Retry-After");
  const later = after ? ` Try again in ${after} s.` : "";
  try {
    return sentence((await response.json()).error.message) + later;
  } catch {
    return `The server, or what stands before it, answered with status ${response.status}.${later}`;
  }
}

function sentence(message) {
  return /[.!?]$/.test(message) ? message : `${message}.`;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await orThrow(reader.read(), BROKEN_OFF);
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}
