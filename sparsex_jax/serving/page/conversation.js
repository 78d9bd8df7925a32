// Asks the server, and keeps what it answers in the chat. `view` is told what changed:
// { turns(), answer(turn), report(turn, isWhole), status(text), giveBack(question) }.

import { state } from "./keep.js";
import { measure } from "./work.js";
import { nameOfMethod } from "./words.js";

const WORTH_MEASURING = 0.95; // of the work; where less was saved, there is no speed-up to show

export class Conversation {
  constructor(api, view) {
    this.api = api;
    this.view = view;
  }

  // documents: [{ name, tokens, handle }], as chips show them. `content` has their texts already.
  async ask({ question, content, documents = [], sides = [], tries = 0 }, signal) {
    const asked = { role: "user", content, question, documents };
    const answer = { role: "assistant", content: "", pending: true, tries };
    if (sides.length) answer.sides = sides.map((method) => ({ method, content: "", waiting: true }));
    state.turns.push(asked, answer);
    Object.assign(state, { chosen: state.turns.length - 1, side: null });
    this.view.turns();
    try {
      await this.#fill(answer, signal);
    } finally {
      this.settle(asked, answer, signal.aborted ? "stopped" : "broken off");
    }
    if (!answer.cut) measure((until) => this.#measureFull(answer, until));
  }

  // The end of an answer. One that did not finish keeps its text so far, if it has any; else the question is taken back.
  settle(asked, answer, cut) {
    const finished = !answer.pending;
    for (const each of [answer, ...(answer.sides ?? [])]) {
      delete each.pending;
      delete each.waiting;
    }
    if (finished) return;
    if (answer.content || answer.thought || answer.sides?.some((side) => side.content)) answer.cut = cut;
    else this.#takeBack(asked);
  }

  // Asks the last question again, with another seed.
  retry(signal) {
    const [asked, answer] = state.turns.splice(-2);
    const sides = (answer.sides ?? []).map((side) => side.method);
    return this.ask({ ...asked, sides, tries: (answer.tries ?? 0) + 1 }, signal);
  }

  // Takes a question and its empty answer out of the chat, so that no later prompt has them, and gives the text back.
  #takeBack(asked) {
    state.turns.splice(state.turns.indexOf(asked), 2);
    const last = state.turns.findLastIndex((turn) => turn.role === "assistant");
    Object.assign(state, { chosen: last < 0 ? null : last, side: null });
    const handles = (asked.documents ?? []).map((document) => document.handle);
    for (const note of state.notes) note.ticked ||= handles.includes(note.handle);
    this.view.giveBack(asked.question);
  }

  // The other methods answer first and keep nothing, so that all find the store as it was.
  async #fill(answer, signal) {
    const messages = messagesBefore(answer);
    const { method } = state.settings;
    for (const side of answer.sides ?? []) {
      this.view.status(`Asking: ${nameOfMethod(side.method)}`);
      await this.#stream(side, request(messages, side.method, answer.tries, { keep: false }), signal, answer);
    }
    this.view.status(answer.sides ? `Asking: ${nameOfMethod(method)}` : "Answering");
    answer.started = performance.now();
    await this.#stream(answer, request(messages, method, answer.tries), signal, answer);
  }

  // Fills an answer, or one of its sides, while its chunks come.
  async #stream(side, body, signal, turn) {
    delete side.waiting;
    Object.assign(side, { pending: true, started: performance.now() });
    let first = null; // the first chunk that had tokens: [time, tokens]
    this.view.answer(turn);
    for await (const chunk of this.api.chat(body, signal)) {
      const delta = chunk.choices[0]?.delta ?? {};
      side.content += delta.content || "";
      if (delta.reasoning_content) side.thought = (side.thought ?? "") + delta.reasoning_content;
      if (chunk.sparsex) side.report = chunk.sparsex;
      if (chunk.usage) first = count(side, chunk.usage, first);
      this.view.answer(turn);
      this.view.report(turn, Boolean(chunk.sparsex));
    }
    delete side.started;
    side.pending = false;
    this.view.answer(turn);
  }

  // How long the first token takes without reuse. Nobody sees the answer, so one token is enough.
  async #measureFull(answer, signal) {
    const full = answer.sides?.find((side) => side.method === "full")?.report;
    if (full) answer.full = { ttft_s: full.ttft_s };
    else if (state.settings.measure && answer.report && answer.report.computed_fraction < WORTH_MEASURING) {
      const body = request(messagesBefore(answer), "full", 0, { keep: false, max_tokens: 1 });
      for await (const chunk of this.api.chat(body, signal)) {
        if (chunk.sparsex) answer.full = { ttft_s: chunk.sparsex.ttft_s };
      }
    }
    this.view.answer(answer);
    this.view.report(answer, true);
  }
}

function messagesBefore(answer) {
  const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  return [...system, ...state.turns.slice(0, state.turns.indexOf(answer)).map(messageOf)];
}

function messageOf({ role, content, thought }) {
  return thought ? { role, content, reasoning_content: thought } : { role, content };
}

function request(messages, method, seed, extra = {}) {
  const { tokens, temperature } = state.settings;
  const most = Number(tokens) ? { max_tokens: Number(tokens) } : {};
  const reuse = method ? { reuse: { method } } : {};
  return { messages, ...most, temperature: Number(temperature), seed: seed ?? 0, ...reuse, ...extra };
}

// Tokens a second, over those behind the first chunk that had some, because a chunk may have several.
function count(side, usage, first) {
  side.cached = usage.prompt_tokens_details.cached_tokens;
  side.new_tokens = usage.completion_tokens;
  if (!first) return side.new_tokens ? [performance.now(), side.new_tokens] : null;
  const elapsed = (performance.now() - first[0]) / 1000;
  if (side.new_tokens > first[1] && elapsed > 0) side.speed = (side.new_tokens - first[1]) / elapsed;
  return first;
}
