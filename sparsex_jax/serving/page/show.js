// Shows the state: turns, notes, the report of the selected answer, the store. Changes nothing of it.

import { state } from "./keep.js";
import {
  countKinds, element, kindsOf, paintBar, paintLegend, paintPrompt, paintSegments, paintTiers, percent, seconds, shorten,
} from "./paint.js";

export const $ = (id) => document.getElementById(id);

// choose(index), so that a click on an answer selects it
export function paintTurns(choose) {
  $("empty").hidden = state.turns.length > 0;
  $("turns").replaceChildren(...state.turns.map((turn, at) => turnOf(turn, at, choose)));
}

function turnOf(turn, at, choose) {
  if (turn.role === "user") return element("div", "turn user", turn.content);
  const shown = element("button", "turn assistant", turn.content || (turn.pending ? "…" : "(no text)"));
  shown.type = "button";
  shown.setAttribute("aria-pressed", String(at === state.chosen));
  const about = facts(turn);
  if (about) shown.append(element("span", "facts", about));
  shown.addEventListener("click", () => choose(at));
  return shown;
}

function facts({ report, cut }) {
  const words = report
    ? [`first token after ${seconds(report.ttft_s)}`, `${percent(report.computed_fraction)} computed`] : [];
  return (cut ? [...words, cut] : words).join(", ");
}

// notes: those to show. going: those that are being forgotten. actions: { tick(note, yes), forget(note) }
export function paintNotes(notes, going, actions) {
  $("notes").replaceChildren(...notes.map((note) => noteItem(note, going.has(note), actions)));
  const ticked = notes.filter((note) => note.ticked);
  $("attached").replaceChildren(...ticked.map((note) => element("span", "chip", shorten(note.text, 32))));
}

function noteItem(note, going, actions) {
  const item = element("li");
  const label = element("label");
  const box = element("input");
  box.type = "checkbox";
  box.checked = note.ticked;
  box.addEventListener("change", () => actions.tick(note, box.checked));
  const button = element("button", "", "Forget");
  button.type = "button";
  button.disabled = going;
  button.addEventListener("click", () => actions.forget(note));
  label.append(box, element("span", "", shorten(note.text, 80)));
  item.append(label, button);
  return item;
}

export function paintReport() {
  const turn = state.turns[state.chosen];
  const report = turn?.report;
  $("report").hidden = !report;
  if (!report) return;
  const kinds = kindsOf(report.token_map);
  const counts = countKinds(kinds);
  $("ttft").textContent = seconds(report.ttft_s);
  $("computed").textContent = percent(report.computed_fraction);
  $("cached").textContent = turn.cached ?? counts.prefix + counts.approximate_prefix + counts.reused + counts.omitted;
  $("cached-text").textContent = `of ${report.prompt_tokens} tokens not recomputed`;
  paintComparison(turn);
  paintBar($("kinds"), counts);
  paintLegend($("legend"), counts);
  paintPrompt($("prompt"), report.token_map, kinds);
  paintSegments($("segments").tBodies[0], report, sourceOf);
  const far = report.prefix_tier && report.prefix_tier !== "device";
  $("prefix-tier").hidden = !far;
  $("prefix-tier").textContent = far ? `The prefix came from ${report.prefix_tier}.` : "";
  $("segments").hidden = !report.segments.length;
  $("no-segments").hidden = report.segments.length > 0;
}

export function paintComparison({ report, full }) {
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

export function paintStore(store) {
  paintBar($("store-bar"), { active: store.active, frozen: store.frozen, cached: store.cached, free: store.free });
  $("store-text").textContent = `${store.pages - store.free} of ${store.pages} pages`;
  paintTiers($("tiers"), store.tiers);
  $("store").title = `Pages of the KV store: ${store.active} active, ${store.frozen} frozen, ${store.cached} cached`;
}

export function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

// While the page works with the server, only Stop does.
export function busy(yes) {
  for (const id of ["send", "compare", "example", "clear", "keep"]) $(id).disabled = yes;
  $("stop").hidden = !yes;
}
