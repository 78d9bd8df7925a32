// The documents that the server keeps the KV of: the list of them, those that go before the next question, and files.

import { $, button, element } from "./dom.js";
import { state } from "./keep.js";
import { untilStopped } from "./work.js";
import { count, shorten } from "./words.js";

export class Documents {
  // view: { changed(), status(text), complain(error) }
  constructor(api, view) {
    this.api = api;
    this.view = view;
    this.going = new Set(); // those that are being forgotten
  }

  // Those of the salt that is set. Those of another one are not lost, but cannot be found.
  all() {
    return state.notes.filter((note) => (note.salt ?? "") === state.settings.salt);
  }

  ticked() {
    return this.all().filter((note) => note.ticked);
  }

  async remember(text, name, signal, ticked = false) {
    signal.throwIfAborted();
    const { salt } = state.settings;
    this.view.status(`Storing ${name || "a text"}`);
    const stored = this.api.remember(text).then(({ handle, num_tokens }) => {
      const known = state.notes.find((note) => note.handle === handle);
      if (known) known.ticked ||= ticked;
      else state.notes.push({ handle, num_tokens, salt, name, text, ticked });
      this.view.changed();
    });
    await untilStopped(stored, signal);
  }

  // Files become documents for the next question, one after the other.
  async rememberFiles(files, signal) {
    for (const file of files) {
      const text = await textOf(file);
      await this.remember(text, file.name, signal, true);
    }
  }

  async forget(note) {
    this.going.add(note);
    this.paint();
    try {
      await this.api.forget(note.handle).catch((error) => {
        if (error.status !== 404) throw error; // the server does not have it any more
      });
      state.notes = state.notes.filter((each) => each !== note);
    } finally {
      this.going.delete(note);
      this.view.changed();
    }
  }

  // Drops those that the server evicted, or lost in a restart. A restarted server gives handles anew.
  async check() {
    const before = this.all();
    if (!before.length) return;
    const sizes = new Map((await this.api.notes()).map((entry) => [entry.handle, entry.num_tokens]));
    const isThere = ({ handle, num_tokens }) => sizes.has(handle) && (num_tokens ?? sizes.get(handle)) === sizes.get(handle);
    state.notes = state.notes.filter((note) => !before.includes(note) || isThere(note));
    this.view.changed();
  }

  tick(note, yes) {
    note.ticked = yes;
    this.view.changed();
  }

  paint() {
    const notes = this.all();
    $("notes").replaceChildren(...notes.map((note) => this.#item(note)));
    $("no-notes").hidden = notes.length > 0;
    $("open-documents").textContent = notes.length ? `Documents (${notes.length})` : "Documents";
    $("attached").replaceChildren(...this.ticked().map((note) => this.#chip(note)));
  }

  #item(note) {
    const box = element("input");
    box.type = "checkbox";
    box.checked = note.ticked;
    box.addEventListener("change", () => this.tick(note, box.checked));
    const text = element("span", "about", element("b", "", titleOf(note)), element("span", "quiet", sizeOf(note)));
    const forget = button("small", "Forget", () => this.forget(note).catch(this.view.complain), `Forget ${titleOf(note)}`);
    forget.disabled = this.going.has(note);
    return element("li", "", element("label", "", box, text), forget);
  }

  #chip(note) {
    const remove = button("remove", "×", () => this.tick(note, false), `Leave out ${titleOf(note)}`);
    return element("li", "chip", titleOf(note), element("span", "quiet", sizeOf(note)), remove);
  }
}

export function titleOf(note) {
  return shorten(note.name || note.text, 32);
}

function sizeOf(note) {
  return note.num_tokens ? ` ${count(note.num_tokens, "token")}` : "";
}

// The texts of documents, and a question behind them.
export function withDocuments(texts, question) {
  return [...texts.map((text, at) => `Document ${at + 1}:\n${text}`), question].join("\n\n");
}

async function textOf(file) {
  const bytes = await file.arrayBuffer();
  let text = "";
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) throw new Error(`${file.name} is not a text file. Files must be text in UTF-8.`);
  if (!text.trim()) throw new Error(`${file.name} is empty.`);
  return text.trim();
}
