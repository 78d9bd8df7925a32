// What the server reused for the selected answer: figures, the picture of the layers, the prompt in colours, segments.

import { $, element, fillBar, svg } from "./dom.js";
import { state } from "./keep.js";
import { describeLayers, expand, paintLayers, runsOf } from "./layers.js";
import { nameOfMethod, percent, rate, seconds, shorten, speedUp, times } from "./words.js";

export const KINDS = ["prefix", "approximate_prefix", "reused", "recomputed", "fresh", "omitted"];
const MEANING = {
  prefix: "stored as the beginning of a prompt, used as it is",
  approximate_prefix: "stored as the beginning of a prompt, as its approximate prefill left it",
  reused: "found in the store and copied to this position",
  recomputed: "found in the store, but computed again",
  fresh: "not found, so computed",
  omitted: "looked at by the new tokens, and left out of what is answered from",
};
const MOST_TOKENS = 4000; // of a prompt that is shown token by token; of a longer one, runs of one kind are one element

// The answer that is selected: a turn, or one of its sides.
export function selected() {
  const turn = state.turns[state.chosen];
  return turn?.sides?.[state.side] ?? turn;
}

export function paintReport() {
  const turn = selected();
  const report = turn?.report;
  $("report").hidden = !report;
  document.body.classList.toggle("has-report", Boolean(report));
  if (!report) return;
  const kinds = kindsOf(report.token_map);
  const counts = countKinds(kinds);
  $("report-of").textContent = nameOfMethod(turn.method ?? state.settings.method);
  $("ttft").textContent = seconds(report.ttft_s);
  $("computed").textContent = percent(report.computed_fraction);
  $("cached").textContent = turn.cached ?? counts.prefix + counts.approximate_prefix + counts.reused + counts.omitted;
  $("cached-text").textContent = `of ${report.prompt_tokens} tokens not recomputed`;
  paintSpeed(turn);
  paintPicture(turn);
  fillBar($("kinds"), counts, wordsOf);
  paintLegend($("legend"), counts);
  paintPrompt($("prompt"), report.token_map.text, kinds);
  paintSegments($("segments").tBodies[0], report);
  paintTier(report);
}

// What changes with each token of the answer.
export function paintPicture(turn) {
  const { token_map: map, prompt_tokens: tokens } = turn.report;
  const layers = map.layers ?? []; // a report that was kept by an older page has none
  $("picture").hidden = !layers.length;
  if (!layers.length) return;
  paintLayers($("layers"), kindsOf(map), layers, turn.new_tokens ?? 0);
  $("layers").setAttribute("aria-label", describeLayers(layers, tokens));
  $("layers-text").textContent = `${layers.at(-1).end} layers × ${tokens} tokens${turn.new_tokens ? `, and ${turn.new_tokens} of the answer` : ""}`;
  $("speed").textContent = turn.speed ? rate(turn.speed) : "–";
}

// Against full recompute: the measured times, or, where nothing was measured, the work.
function paintSpeed({ report, method, full }) {
  const measured = full ?? fullOfSides();
  const ratio = measured ? measured.ttft_s / report.ttft_s : 1 / Math.max(report.computed_fraction, 1e-3);
  const isFull = method === "full";
  $("saving").textContent = isFull ? "1×" : measured ? speedUp(ratio) : `${times(ratio)} less work`;
  $("saving").classList.toggle("slower", ratio <= 0.95);
  $("saving-text").textContent = isFull ? "the others are compared with this"
    : measured ? "to the first token, measured against full recompute" : "than full recompute";
  $("versus").hidden = !measured || isFull;
  if (measured) $("versus").replaceChildren(...bars([["this answer", report.ttft_s], ["full recompute", measured.ttft_s]]));
}

function fullOfSides() {
  return state.turns[state.chosen]?.sides?.find((side) => side.method === "full")?.report;
}

function bars(rows) {
  const longest = Math.max(...rows.map(([, value]) => value));
  return rows.map(([name, value], at) => {
    const width = (100 * value) / longest;
    const picture = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { width, height: 8, rx: 2, class: at ? "other" : "own" }));
    return element("div", "versus-row", element("span", "", name), picture, element("b", "", seconds(value)));
  });
}

// The kind of each token of the prompt, one of KINDS.
export function kindsOf(map) {
  const active = expand(map.active);
  return expand(map.kind).map((kind, at) => (kind === "reused" && active[at] ? "recomputed" : kind));
}

export function countKinds(kinds) {
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  for (const kind of kinds) counts[kind] += 1;
  return counts;
}

function wordsOf(kind) {
  return kind.replace("_", " ");
}

function paintLegend(list, counts) {
  list.replaceChildren(...KINDS.map((kind) => {
    const item = element("li", counts[kind] ? "" : "none", element("span", `key ${kind}`), `${wordsOf(kind)} ${counts[kind]}`);
    item.title = MEANING[kind];
    return item;
  }));
}

function paintPrompt(place, texts, kinds) {
  const runs = texts.length > MOST_TOKENS ? runsOf(kinds) : kinds.map((value, start) => ({ value, start, length: 1 }));
  place.replaceChildren(...runs.map(({ value, start, length }) => {
    const token = element("span", `token ${value}`, texts.slice(start, start + length).join(""));
    token.title = `token ${start}: ${wordsOf(value)}, ${MEANING[value]}`;
    return token;
  }));
}

function paintSegments(body, report) {
  body.replaceChildren(...report.segments.map((segment) => {
    const text = report.token_map.text.slice(segment.start, segment.start + segment.length).join("");
    return element("tr", "",
      element("td", "", range(segment.start, segment.length)),
      element("td", "", range(segment.donor_start, segment.length)),
      element("td", "", sourceOf(text)),
      element("td", "", segment.tier ?? "device"), // a report that was kept by an older page has none
      element("td", "", shorten(text, 90)));
  }));
  $("segments").hidden = !report.segments.length;
  $("no-segments").hidden = report.segments.length > 0;
}

function paintTier({ prefix_tier: tier }) {
  const isFar = Boolean(tier) && tier !== "device";
  $("prefix-tier").hidden = !isFar;
  $("prefix-tier").textContent = isFar ? `The prefix came from ${tier}.` : "";
}

function sourceOf(text) {
  const core = text.trim();
  const note = state.notes.find((each) => each.text.includes(core) || core.includes(each.text));
  if (note) return note.name || `document ${note.handle}`;
  return state.turns.some((turn) => turn.content.includes(core)) ? "this chat" : "an earlier prompt";
}

function range(start, length) {
  return `${start}–${start + length - 1}`;
}
