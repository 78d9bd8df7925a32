// What the page knows, and how it survives a reload. The API key is kept in the tab's session storage only.
//
// A browser may refuse storage, and what is stored may be another version's: the page works all the same.

const NAME = "sparsex.page";

export const state = {
  // {role: "user", content, question, notes: handles}, or
  // {role: "assistant", content, pending, cut, report, cached, full: {ttft_s, text}}
  turns: [],
  notes: [], // {handle, num_tokens, salt, text, ticked}
  chosen: null, // index of the selected turn, whose report is shown
  settings: { method: "", tokens: 128, temperature: 0, salt: "" },
  drafts: { question: "", note: "" },
};

// Returns whether all of it was kept. A chat that is too long for the browser is kept without its reports.
export function save() {
  const kept = write(localStorageOf, JSON.stringify(state));
  if (!kept) write(localStorageOf, JSON.stringify({ ...state, turns: state.turns.map(withoutReport) }));
  return kept;
}

export function restore() {
  let stored = null;
  try {
    stored = JSON.parse(localStorageOf().getItem(NAME));
  } catch {
    return; // nothing can be stored, or nothing readable was
  }
  const { turns, notes, chosen, settings, drafts } = Object(stored);
  if (Array.isArray(turns)) state.turns = turns.filter((turn) => typeof turn?.content === "string");
  if (Array.isArray(notes)) state.notes = notes.filter((note) => typeof note?.text === "string");
  state.chosen = state.turns[chosen] ? chosen : null;
  Object.assign(state.settings, settings);
  Object.assign(state.drafts, drafts);
}

export function key() {
  try {
    return sessionStorageOf().getItem(NAME) || "";
  } catch {
    return keyOfThisPage;
  }
}

export function keepKey(value) {
  keyOfThisPage = value;
  write(sessionStorageOf, value);
}

let keyOfThisPage = "";
const localStorageOf = () => localStorage;
const sessionStorageOf = () => sessionStorage;

function write(storage, text) {
  try {
    storage().setItem(NAME, text);
    return true;
  } catch {
    return false;
  }
}

function withoutReport({ report, full, ...rest }) {
  return rest;
}
