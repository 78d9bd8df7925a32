// The page: a chat, and beside it a report of what the server reused for the selected answer.
//
// `state` holds everything that survives a reload. The API key is kept in the tab's session storage only.

import { Api } from "./api.js";
import { INSTRUCTION, NOTES, QUESTION } from "./example.js";
import {
  countKinds, element, kindsOf, paintBar, paintLegend, paintPrompt, paintSegments, percent, seconds, shorten,
} from "./paint.js";

const STORED = "sparsex.page";
const $ = (id) => document.getElementById(id);

const state = {
  // {role: "user", content, shown} or {role: "assistant", content, report, cached, full: {ttft_s, text}}
  turns: [],
  notes: [], // {handle, text, ticked}
  chosen: null, // index of the selected turn, whose report is shown
  settings: { method: "", tokens: 128, temperature: 0, salt: "" },
};
let running = null; // AbortController of the running request
const api = new Api(() => ({ key: sessionStorage.getItem(STORED) || "", salt: state.settings.salt }));

// Keeping ------------------------------------------------------------------------------------------------------------

function save() {
  try {
    localStorage.setItem(STORED, JSON.stringify(state));
  } catch (error) {
    say(`This chat is too long to survive a reload: ${error.message}`);
  }
}

function restore() {
  try {
    Object.assign(state, JSON.parse(localStorage.getItem(STORED) || "{}"));
  } catch {
    localStorage.removeItem(STORED); // another version of the page wrote it
  }
}

// Asking -------------------------------------------------------------------------------------------------------------

async function ask(question) {
  const notes = state.notes.filter((note) => note.ticked);
  const content = [...notes.map((note, at) => `Note ${at + 1}:\n${note.text}`), question].join("\n\n");
  state.turns.push({ role: "user", content });
  const answer = { role: "assistant", content: "" };
  state.turns.push(answer);
  state.chosen = state.turns.length - 1;
  for (const note of notes) note.ticked = false;
  paint();
  await stream(answer, request(state.turns.slice(0, -1)), () => {
    paintTurns();
    if (state.turns[state.chosen] === answer) paintReport();
  });
}

function request(turns, extra = {}) {
  const { method, tokens, temperature } = state.settings;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const reuse = method ? { reuse: { method } } : {};
  return { messages, max_tokens: Number(tokens), temperature: Number(temperature), seed: 0, ...reuse, ...extra };
}

// Fill an answer while its chunks come. If the user stops it, the text so far stays.
async function stream(answer, body, changed) {
  running = new AbortController();
  busy(true);
  say("");
  try {
    for await (const chunk of api.chat(body, running.signal)) {
      if (chunk.sparsex) answer.report = chunk.sparsex;
      if (chunk.usage) answer.cached = chunk.usage.prompt_tokens_details.cached_tokens;
      answer.content += chunk.choices[0]?.delta.content || "";
      changed();
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  } finally {
    running = null;
    busy(false);
    save();
    paint();
    showStore();
  }
}

async function compare() {
  const turn = state.turns[state.chosen];
  const full = { content: "" };
  const before = state.turns.slice(0, state.chosen);
  await stream(full, request(before, { reuse: { method: "full" }, keep: false }), () => {
    if (full.report) turn.full = { ttft_s: full.report.ttft_s, text: full.content };
    paintReport();
  });
}

async function remember(text) {
  const { handle } = await api.remember(text);
  state.notes.push({ handle, text, ticked: false });
  save();
  paint();
  showStore();
}

async function forget(note) {
  state.notes = state.notes.filter((each) => each !== note);
  save();
  paint();
  await api.forget(note.handle).catch(() => {}); // if the server does not have it any more, nothing is left to do
  showStore();
}

async function example() {
  busy(true);
  try {
    for (const text of NOTES) if (!state.notes.some((note) => note.text === text)) await remember(text);
  } finally {
    busy(false);
  }
  for (const note of state.notes) note.ticked = false;
  // The prompt has the notes in another order than the one they were stored in.
  state.notes.sort((a, b) => a.text.length - b.text.length);
  for (const note of state.notes) note.ticked = NOTES.includes(note.text);
  await ask(`${INSTRUCTION} ${QUESTION}`);
}

// Drops the notes that the server evicted, or lost in a restart, from the list.
async function checkNotes() {
  if (!state.notes.length) return;
  const handles = new Set((await api.notes()).map((entry) => entry.handle));
  state.notes = state.notes.filter((note) => handles.has(note.handle));
  save();
  paintNotes();
}

// Showing ------------------------------------------------------------------------------------------------------------

function paint() {
  paintTurns();
  paintNotes();
  paintReport();
}

function paintTurns() {
  $("empty").hidden = state.turns.length > 0;
  $("turns").replaceChildren(
    ...state.turns.map((turn, at) => {
      if (turn.role === "user") return element("div", "turn user", turn.content);
      const shown = element("button", "turn assistant", turn.content || "…");
      shown.type = "button";
      shown.setAttribute("aria-pressed", String(at === state.chosen));
      if (turn.report) shown.append(element("span", "facts", facts(turn)));
      shown.addEventListener("click", () => choose(at));
      return shown;
    }),
  );
}

function facts({ report }) {
  return `first token after ${seconds(report.ttft_s)}, ${percent(report.computed_fraction)} computed`;
}

function choose(at) {
  state.chosen = at;
  save();
  paint();
}

function paintNotes() {
  $("notes").replaceChildren(...state.notes.map(noteItem));
  const ticked = state.notes.filter((note) => note.ticked);
  $("attached").replaceChildren(...ticked.map((note) => element("span", "chip", shorten(note.text, 32))));
}

function noteItem(note) {
  const item = element("li");
  const label = element("label");
  const box = element("input");
  box.type = "checkbox";
  box.checked = note.ticked;
  box.addEventListener("change", () => {
    note.ticked = box.checked;
    save();
    paintNotes();
  });
  const button = element("button", "", "Forget");
  button.type = "button";
  button.addEventListener("click", () => forget(note));
  label.append(box, element("span", "", shorten(note.text, 80)));
  item.append(label, button);
  return item;
}

function paintReport() {
  const turn = state.turns[state.chosen];
  const report = turn?.report;
  $("report").hidden = !report;
  if (!report) return;
  const kinds = kindsOf(report.token_map);
  const counts = countKinds(kinds);
  $("ttft").textContent = seconds(report.ttft_s);
  $("computed").textContent = percent(report.computed_fraction);
  $("cached").textContent = turn.cached ?? counts.prefix + counts.approximate_prefix + counts.reused;
  $("cached-text").textContent = `of ${report.prompt_tokens} tokens not recomputed`;
  paintComparison(turn);
  paintBar($("kinds"), counts);
  paintLegend($("legend"), counts);
  paintPrompt($("prompt"), report.token_map, kinds);
  paintSegments($("segments").tBodies[0], report, sourceOf);
  $("segments").hidden = !report.segments.length;
  $("no-segments").hidden = report.segments.length > 0;
}

function paintComparison({ report, full }) {
  const ratio = full ? full.ttft_s / report.ttft_s : 1;
  $("saving").textContent = full ? `${Math.max(ratio, 1 / ratio).toFixed(1)}×` : percent(1 - report.computed_fraction);
  $("saving-text").textContent = !full ? "of full recompute's work saved"
    : `${ratio >= 1 ? "faster" : "slower"} than full recompute to the first token`;
  $("compare-text").textContent = full
    ? `Full recompute: first token after ${seconds(full.ttft_s)}.`
    : "Asks again, computes everything, and keeps nothing.";
  $("full-answer").hidden = !full;
  $("full-answer").textContent = full ? full.text : "";
}

function sourceOf(text) {
  const core = text.trim();
  const note = state.notes.find((each) => each.text.includes(core) || core.includes(each.text));
  if (note) return `knowledge ${note.handle}`;
  return state.turns.some((turn) => turn.content.includes(core)) ? "this chat" : "an earlier prompt";
}

async function showStore() {
  try {
    const store = await api.store();
    paintBar($("store-bar"), { active: store.active, frozen: store.frozen, cached: store.cached, free: store.free });
    $("store-text").textContent = `${store.pages - store.free} of ${store.pages} pages`;
    $("store").title = `Pages of the KV store: ${store.active} active, ${store.frozen} frozen, ${store.cached} cached`;
  } catch (error) {
    $("store-text").textContent = shorten(error.message, 60);
  }
}

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function busy(yes) {
  for (const id of ["send", "compare", "example", "clear"]) $(id).disabled = yes;
  $("stop").hidden = !yes;
}

// Starting -----------------------------------------------------------------------------------------------------------

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || running) return;
    $("question").value = "";
    ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    state.turns = [];
    state.chosen = null;
    save();
    paint();
  });
  $("example").addEventListener("click", () => example().catch((error) => say(error.message)));
  $("compare").addEventListener("click", compare);
  $("remember").addEventListener("submit", (event) => {
    event.preventDefault();
    remember($("note").value.trim()).then(() => ($("note").value = ""), (error) => say(error.message));
  });
  listenToSettings();
  addEventListener("pagehide", save);
}

function listenToSettings() {
  const fields = $("settings").elements;
  for (const [name, value] of Object.entries(state.settings)) fields[name].value = value;
  fields.key.value = sessionStorage.getItem(STORED) || "";
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("change", () => {
    for (const name of Object.keys(state.settings)) state.settings[name] = fields[name].value;
    sessionStorage.setItem(STORED, fields.key.value);
    save();
    greet();
  });
}

function greet() {
  say("");
  api.model().then((model) => ($("model").textContent = model.id), (error) => say(error.message));
  checkNotes().catch(() => {}); // api.model() has shown the error already
  showStore();
}

restore();
listen();
paint();
greet();
setInterval(() => document.hidden || showStore(), 4000);
