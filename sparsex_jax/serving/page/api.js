// The server's endpoints, as the page calls them.

export class Api {
  // settings: a function that returns { key, salt }
  constructor(settings) {
    this.settings = settings;
  }

  async json(path, options = {}) {
    const response = await this.fetch(path, options);
    return response.json();
  }

  async fetch(path, options) {
    const { key } = this.settings();
    const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (!response.ok) throw new Error(await messageOf(response));
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

  // Yields the chunks of an answer while they come.
  async *chat(request, signal) {
    const body = {
      ...request, ...this.saltField(), stream: true, stream_options: { include_usage: true }, return_token_map: true,
    };
    const response = await this.fetch("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}
