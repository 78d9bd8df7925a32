// Starts the page: ties what people do to the chat, the documents and the examples, and shows what changes.

import { Api } from "./api.js";
import { Conversation } from "./conversation.js";
import { Documents, withDocuments } from "./documents.js";
import { $, button, element } from "./dom.js";
import { askAgents, askChat, askDocuments } from "./examples.js";
import { key, keepKey, putAway, restore, save as write, state, takeOut } from "./keep.js";
import { paintPicture, paintReport, selected } from "./report.js";
import { paintSettings, readSettings } from "./settings.js";
import { paintStore } from "./store.js";
import { describe, paintTurn, paintTurns, tickTurn } from "./turns.js";
import { isWorking, onWork, stop, work } from "./work.js";
import { shorten } from "./words.js";

const POLL_MS = 4000;
const TICK_MS = 100;
const EXAMPLES = { "example-documents": askDocuments, "example-chat": askChat, "example-agents": askAgents };

const api = new Api(() => ({ key: key(), salt: state.settings.salt }));
const documents = new Documents(api, { changed: changedDocuments, status, complain });
const conversation = new Conversation(api, {
  turns: paintNew, answer: changedAnswer, report: changedReport, status, giveBack,
});
const actions = { choose, retry: () => work((signal) => conversation.retry(signal)) };

// Working --------------------------------------------------------------------------------------------------------------

onWork({
  begin() {
    say("");
    busy(true);
  },
  fail: complain,
  end() {
    busy(false);
    status("");
    save();
    paint();
    showStore();
    announce();
  },
});

// While the page works with the server, only Stop does.
function busy(yes) {
  for (const id of ["send", "clear", "keep", "files", ...Object.keys(EXAMPLES)]) $(id).disabled = yes;
  $("stop").hidden = !yes;
  $("send").hidden = yes;
}

// What went wrong and what is under way stand above the composer, or in the dialog that covers it.
function placeNotices() {
  const head = document.querySelector("dialog[open] .head");
  if (head) head.after($("notices"));
  else $("composer").prepend($("notices"));
}

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function status(text) {
  $("status").textContent = text ? `${text} …` : "";
}

// For screen readers: an answer when it is complete, not each of its pieces.
function announce() {
  const last = state.turns.at(-1);
  $("announced").textContent = last?.role === "assistant" && !last.cut ? describe(last) : "";
}

function complain(error) {
  say(error.status === 401 ? `${error.message} Enter it here:` : error.message);
  if (error.status === 401) showKey($("key-needed")).focus();
}

// The key's field is among the settings, or beside the problem while it is what lacks.
function showKey(place) {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  const field = $("settings").elements.key;
  place.append(field.parentElement);
  return field;
}

// Asking ---------------------------------------------------------------------------------------------------------------

async function send(question, signal) {
  const notes = documents.ticked();
  const content = withDocuments(notes.map((note) => note.text), question);
  const chips = notes.map(({ name, text, num_tokens, handle }) => ({ name: name || shorten(text, 32), tokens: num_tokens, handle }));
  for (const note of notes) note.ticked = false;
  const sides = state.settings.aside ? sidesOf() : [];
  await conversation.ask({ question, content, documents: chips, sides }, signal);
}

function sidesOf() {
  return state.settings.sides.filter((method) => method !== state.settings.method);
}

// A question that is taken back comes before what was written meanwhile.
function giveBack(question) {
  $("question").value = [question, $("question").value].filter(Boolean).join("\n");
}

async function runExample(example, signal) {
  if (state.turns.length) putAway();
  const ask = (asked) => conversation.ask(asked, signal);
  try {
    await example({ api, documents, ask, sides: sidesOf() }, signal);
  } finally {
    if (!state.turns.length) state.system = "";
  }
}

// Showing --------------------------------------------------------------------------------------------------------------

function paint() {
  $("welcome").hidden = state.turns.length > 0;
  document.body.classList.toggle("has-turns", state.turns.length > 0);
  paintTurns(actions, isWorking());
  if (document.activeElement !== $("system")) $("system").value = state.system;
  $("system-text").textContent = state.system ? shorten(state.system, 60) : "none";
  documents.paint();
  paintChats();
  paintReport();
}

function paintNew() {
  paint();
  $("turns").lastElementChild?.scrollIntoView({ block: "start" });
}

let frame = 0; // chunks may come faster than the screen changes
function changedAnswer(turn) {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => paintTurn(turn, actions, isWorking()));
}

// isWhole: more than the number of new tokens changed
function changedReport(turn, isWhole) {
  if (state.turns[state.chosen] !== turn) return;
  if (isWhole) paintReport();
  else if (selected().report) paintPicture(selected());
}

function changedDocuments() {
  save();
  documents.paint();
  showStore();
}

function choose(turn, side) {
  Object.assign(state, { chosen: state.turns.indexOf(turn), side });
  save();
  const focused = document.activeElement?.getAttribute("aria-label") ?? document.activeElement?.textContent;
  paintTurns(actions, isWorking());
  paintReport();
  const again = [...document.querySelectorAll("#turns button")].filter((each) => each.ariaPressed === "true");
  if (focused) again[0]?.focus({ preventScroll: true });
  if (matchMedia("(max-width: 62rem)").matches) $("report").scrollIntoView({ block: "start" });
}

function paintChats() {
  $("open-chats").hidden = !state.chats.length;
  $("chats").replaceChildren(...state.chats.map((chat) => element("li", "",
    button("open", shorten(chat.title, 60), () => {
      if (isWorking()) return;
      takeOut(chat);
      $("chats-dialog").close();
      save();
      paint();
    }),
    button("small", "Delete", () => {
      state.chats = state.chats.filter((each) => each !== chat);
      save();
      paintChats();
    }, `Delete the chat: ${shorten(chat.title, 60)}`))));
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

// Listening ------------------------------------------------------------------------------------------------------------

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || isWorking()) return;
    $("question").value = "";
    work((signal) => send(question, signal));
  });
  $("question").addEventListener("keydown", (event) => {
    // 229: the Enter that ends an input method's composition, which Safari no longer calls composing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!event.repeat) $("composer").requestSubmit();
  });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", newChat);
  for (const [id, example] of Object.entries(EXAMPLES)) {
    $(id).addEventListener("click", () => work((signal) => runExample(example, signal)));
  }
  $("aside").addEventListener("click", () => {
    state.settings.aside = !state.settings.aside;
    changedSettings();
  });
  $("system").addEventListener("change", () => {
    state.system = $("system").value;
    save();
    $("system-text").textContent = state.system ? shorten(state.system, 60) : "none";
  });
  listenToDocuments();
  listenToDialogs();
  addEventListener("pagehide", save);
}

function listenToDocuments() {
  const take = (files) => files.length && work((signal) => documents.rememberFiles([...files], signal));
  $("remember").addEventListener("submit", (event) => {
    event.preventDefault();
    work(async (signal) => {
      const written = $("note").value;
      if (!written.trim()) throw new Error("A document needs some text.");
      await documents.remember(written.trim(), "", signal, true);
      if ($("note").value === written) $("note").value = "";
    });
  });
  $("files").addEventListener("change", () => {
    take([...$("files").files]);
    $("files").value = "";
  });
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carriesFiles(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
}

function listenToDialogs() {
  for (const name of ["documents", "settings", "chats"]) {
    const dialog = $(`${name}-dialog`);
    $(`open-${name}`).addEventListener("click", () => {
      dialog.showModal();
      placeNotices();
    });
    dialog.addEventListener("close", placeNotices);
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  }
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  const changed = () => {
    readSettings($("settings"), state.settings);
    keepKey($("settings").elements.key.value.trim());
    changedSettings();
    greet();
  };
  $("settings").addEventListener("change", changed);
  $("key-needed").addEventListener("change", changed);
}

function changedSettings() {
  $("aside").setAttribute("aria-pressed", String(state.settings.aside));
  save();
  documents.paint();
}

function newChat() {
  if (isWorking()) return;
  putAway();
  say("");
  save();
  paint();
  $("question").focus();
}

// Starting -------------------------------------------------------------------------------------------------------------

async function greet() {
  say("");
  showStore();
  try {
    $("model").textContent = (await api.model()).id;
    if ($("key-needed").hasChildNodes()) showKey($("key-place"));
    await documents.check();
  } catch (error) {
    complain(error);
  }
}

// A reload cut off what was under way.
function resume() {
  const [asked, answer] = state.turns.slice(-2);
  $("note").value = state.drafts.note;
  $("question").value = state.drafts.question;
  if (answer?.role !== "assistant") return;
  if (answer.pending) conversation.settle(asked, answer, "broken off");
  else delete answer.pending;
}

restore();
resume();
paintSettings($("settings"), state.settings, key());
listen();
changedSettings();
paint();
greet();
setInterval(() => document.hidden || showStore(), POLL_MS);
setInterval(() => {
  const last = state.turns.at(-1);
  if (isWorking() && last?.pending) tickTurn(last);
}, TICK_MS);
