// What the page knows, and how it survives a reload. The API key is kept in the tab's session storage only.
//
// A browser may refuse storage, and what is stored may be another version's: the page works all the same.

const NAME = "sparsex.page";

export const state = {
  // {role: "user", content, question, documents: [{name, tokens, handle}]}, or
  // {role: "assistant", content, thought, report, cached, new_tokens, speed, pending, cut, tries, full: {ttft_s},
  //  sides: [{method, content, thought, report, cached, new_tokens, speed, pending, error}]}
  turns: [],
  system: "", // text of the chat's system message
  notes: [], // documents: {handle, num_tokens, salt, name, text, ticked}
  chosen: null, // index of the selected turn, whose report is shown
  side: null, // index of the selected one of its sides; null: the turn itself
  chats: [], // earlier ones: {title, system, turns}, newest first, without reports
  settings: {
    method: "", tokens: 128, temperature: 0, salt: "", measure: true, aside: false,
    sides: ["full", "prefix", "naive"], // methods that a question is asked with beside `method`
  },
  drafts: { question: "", note: "" },
};

const MOST_CHATS = 20;

// Puts the chat away among the earlier ones.
export function putAway() {
  const first = state.turns.find((turn) => turn.role === "user");
  if (first) {
    const title = (first.question || first.content).slice(0, 80);
    const turns = state.turns.map(withoutReport);
    state.chats = [{ title, system: state.system, turns }, ...state.chats].slice(0, MOST_CHATS);
  }
  Object.assign(state, { turns: [], system: "", chosen: null, side: null });
}

export function takeOut(chat) {
  putAway();
  state.chats = state.chats.filter((each) => each !== chat);
  Object.assign(state, { turns: chat.turns, system: chat.system });
}

// Returns whether all of it was kept. A chat that is too long for the browser is kept without its reports.
export function save() {
  const kept = write(localStorageOf, JSON.stringify(state));
  if (!kept) write(localStorageOf, JSON.stringify({ ...state, turns: state.turns.map(withoutReport), chats: [] }));
  return kept;
}

export function restore() {
  let stored = null;
  try {
    stored = JSON.parse(localStorageOf().getItem(NAME));
  } catch {
    return; // nothing can be stored, or nothing readable was
  }
  const { turns, notes, chosen, settings, drafts, system, chats } = Object(stored);
  if (Array.isArray(turns)) state.turns = turns.filter((turn) => typeof turn?.content === "string");
  if (Array.isArray(notes)) state.notes = notes.filter((note) => typeof note?.text === "string");
  if (Array.isArray(chats)) state.chats = chats.filter((chat) => Array.isArray(chat?.turns) && chat.title);
  if (typeof system === "string") state.system = system;
  state.chosen = state.turns[chosen] ? chosen : null;
  Object.assign(state.settings, settings);
  if (!Array.isArray(state.settings.sides)) state.settings.sides = [];
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
  return rest.sides ? { ...rest, sides: rest.sides.map(withoutReport) } : rest;
}
