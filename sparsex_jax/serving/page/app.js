// The page: a chat, and beside it a report of what the server reused for the selected answer.

import { Api } from "./api.js";
import { INSTRUCTION, NOTES, QUESTION } from "./example.js";
import { keepKey, key, restore, save as write, state } from "./keep.js";
import { shorten } from "./paint.js";
import { $, busy, paintComparison, paintNotes, paintReport, paintStore, paintTurns, say } from "./show.js";

const POLL_MS = 4000;
let running = null; // AbortController of the work that is under way
const going = new Set(); // notes that are being forgotten
const api = new Api(() => ({ key: key(), salt: state.settings.salt }));

// Working ------------------------------------------------------------------------------------------------------------

// Does one piece of work with the server, which Stop ends. While one is under way, no other begins.
async function work(job) {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  say("");
  busy(true);
  try {
    await job(signal);
  } catch (error) {
    if (!signal.aborted) complain(error);
  } finally {
    running = null;
    busy(false);
    save();
    paint();
    showStore();
  }
}

// Waits for a promise, or until Stop. The promise goes on then: what the server has begun to store, it stores.
function untilStopped(promise, signal) {
  promise.catch(() => {}); // after Stop, nobody waits for it
  const stopped = new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([promise, stopped]);
}

function complain(error) {
  say(error.status === 401 ? `${error.message} Enter it here:` : error.message);
  if (error.status === 401) showKey($("key-needed")).focus();
}

// The key's field is among the settings, or beside the problem while it is what lacks.
function showKey(place) {
  const field = $("settings").elements.key;
  place.append(field.parentElement);
  return field;
}

// Asking -------------------------------------------------------------------------------------------------------------

async function ask(question, signal) {
  const notes = notesOfSalt().filter((note) => note.ticked);
  const content = [...notes.map((note, at) => `Note ${at + 1}:\n${note.text}`), question].join("\n\n");
  const asked = { role: "user", content, question, notes: notes.map((note) => note.handle) };
  const answer = { role: "assistant", content: "", pending: true };
  state.turns.push(asked, answer);
  state.chosen = state.turns.length - 1;
  for (const note of notes) note.ticked = false;
  paint();
  try {
    await fill(answer, request(state.turns.slice(0, -1)), signal);
  } finally {
    settle(asked, answer, signal.aborted ? "stopped" : "broken off");
  }
}

// The end of an answer. One that did not finish keeps its text so far, if it has any; else the question is taken back.
function settle(asked, answer, cut) {
  const finished = !answer.pending;
  delete answer.pending;
  if (finished) return;
  if (answer.content) answer.cut = cut;
  else takeBack(asked);
}

// Takes a question and its empty answer out of the chat, so that no later prompt has them, and gives the text back.
function takeBack(asked) {
  state.turns.splice(state.turns.indexOf(asked), 2);
  const last = state.turns.findLastIndex((turn) => turn.role === "assistant");
  state.chosen = last < 0 ? null : last;
  for (const note of state.notes) note.ticked ||= asked.notes.includes(note.handle);
  $("question").value = [asked.question, $("question").value].filter(Boolean).join("\n");
}

function request(turns, extra = {}) {
  const { method, tokens, temperature } = state.settings;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const most = Number(tokens) ? { max_tokens: Number(tokens) } : {};
  const reuse = method ? { reuse: { method } } : {};
  return { messages, ...most, temperature: Number(temperature), seed: 0, ...reuse, ...extra };
}

// Fills an answer while its chunks come.
async function fill(answer, body, signal) {
  for await (const chunk of api.chat(body, signal)) {
    if (chunk.sparsex) answer.report = chunk.sparsex;
    if (chunk.usage) answer.cached = chunk.usage.prompt_tokens_details.cached_tokens;
    answer.content += chunk.choices[0]?.delta.content || "";
    paintTurns(choose);
    if (chunk.sparsex && state.turns[state.chosen] === answer) paintReport();
  }
  answer.pending = false;
}

async function compare(turn, signal) {
  const body = request(state.turns.slice(0, state.turns.indexOf(turn)), { reuse: { method: "full" }, keep: false });
  const full = { ttft_s: 0, text: "" };
  delete turn.full;
  for await (const chunk of api.chat(body, signal)) {
    if (chunk.sparsex) full.ttft_s = chunk.sparsex.ttft_s;
    full.text += chunk.choices[0]?.delta.content || "";
    if (full.ttft_s && state.turns[state.chosen] === turn) paintComparison({ ...turn, full });
  }
  turn.full = full; // one that did not finish is no comparison
}

// Notes --------------------------------------------------------------------------------------------------------------

function notesOfSalt() {
  return state.notes.filter((note) => (note.salt ?? "") === state.settings.salt);
}

async function remember(text, signal) {
  signal.throwIfAborted();
  const { salt } = state.settings;
  const stored = api.remember(text).then(({ handle, num_tokens }) => {
    if (!state.notes.some((note) => note.handle === handle)) {
      state.notes.push({ handle, num_tokens, salt, text, ticked: false });
    }
    save();
    showNotes();
    showStore();
  });
  await untilStopped(stored, signal);
}

async function rememberNote(signal) {
  const written = $("note").value;
  if (!written.trim()) return say("A note needs some text.");
  await remember(written.trim(), signal);
  if ($("note").value === written) $("note").value = "";
}

async function forget(note) {
  going.add(note);
  showNotes();
  try {
    await api.forget(note.handle).catch((error) => {
      if (error.status !== 404) throw error; // the server does not have it any more
    });
    state.notes = state.notes.filter((each) => each !== note);
  } catch (error) {
    complain(error);
  }
  going.delete(note);
  save();
  showNotes();
  showStore();
}

async function example(signal) {
  for (const text of NOTES) if (!notesOfSalt().some((note) => note.text === text)) await remember(text, signal);
  for (const note of state.notes) note.ticked = false;
  // The prompt has the notes in another order than the one they were stored in.
  state.notes.sort((a, b) => a.text.length - b.text.length);
  for (const note of notesOfSalt()) note.ticked = NOTES.includes(note.text);
  await ask(`${INSTRUCTION} ${QUESTION}`, signal);
}

// Drops the notes that the server evicted, or lost in a restart, from the list. A restarted server gives handles anew.
async function checkNotes() {
  const before = notesOfSalt();
  if (!before.length) return;
  const sizes = new Map((await api.notes()).map((entry) => [entry.handle, entry.num_tokens]));
  const isThere = ({ handle, num_tokens }) => sizes.has(handle) && (num_tokens ?? sizes.get(handle)) === sizes.get(handle);
  state.notes = state.notes.filter((note) => !before.includes(note) || isThere(note));
  save();
  showNotes();
}

// Showing ------------------------------------------------------------------------------------------------------------

function paint() {
  paintTurns(choose);
  showNotes();
  paintReport();
}

function choose(at) {
  state.chosen = at;
  save();
  paintTurns(choose);
  paintReport();
}

function showNotes() {
  paintNotes(notesOfSalt(), going, { tick, forget });
}

function tick(note, yes) {
  note.ticked = yes;
  save();
  showNotes();
}

let asking = false; // for the store: during a long prefill, one question is enough
async function showStore() {
  if (asking) return;
  asking = true;
  try {
    paintStore(await api.store());
  } catch (error) {
    $("store-text").textContent = shorten(error.message, 60);
  } finally {
    asking = false;
  }
}

function save() {
  state.drafts = { question: $("question").value, note: $("note").value };
  if (!write() && $("problem").hidden) say("This browser keeps too little to bring all of this back after a reload.");
}

// Starting -----------------------------------------------------------------------------------------------------------

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || running) return;
    $("question").value = "";
    work((signal) => ask(question, signal));
  });
  $("question").addEventListener("keydown", (event) => {
    // 229: the Enter that ends an input method's composition, which Safari no longer calls composing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!event.repeat) $("composer").requestSubmit();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", clear);
  $("example").addEventListener("click", () => work(example));
  $("compare").addEventListener("click", () => work((signal) => compare(state.turns[state.chosen], signal)));
  $("remember").addEventListener("submit", (event) => {
    event.preventDefault();
    work(rememberNote);
  });
  listenToSettings();
  addEventListener("pagehide", save);
}

function clear() {
  if (running) return;
  state.turns = [];
  state.chosen = null;
  say("");
  save();
  paint();
}

function listenToSettings() {
  const fields = $("settings").elements;
  for (const [name, value] of Object.entries(state.settings)) if (fields[name]) fields[name].value = value;
  fields.key.value = key();
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  const changed = () => {
    for (const name of Object.keys(state.settings)) if (fields[name]) state.settings[name] = fields[name].value;
    keepKey(fields.key.value.trim());
    save();
    showNotes();
    greet();
  };
  $("settings").addEventListener("change", changed);
  $("key-needed").addEventListener("change", changed);
}

async function greet() {
  say("");
  showStore();
  try {
    $("model").textContent = (await api.model()).id;
    showKey($("settings"));
    await checkNotes();
  } catch (error) {
    complain(error);
  }
}

// A reload cut off what was under way.
function resume() {
  const [asked, answer] = state.turns.slice(-2);
  $("question").value = state.drafts.question;
  $("note").value = state.drafts.note;
  if (answer?.role === "assistant" && "pending" in answer) settle(asked, answer, "broken off");
}

restore();
resume();
listen();
paint();
greet();
setInterval(() => document.hidden || showStore(), POLL_MS);
