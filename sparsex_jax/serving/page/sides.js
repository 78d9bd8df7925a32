// Several methods on the same prompt: time to the first token and work as bars, and the texts with what differs marked.

import { button, element, svg } from "./dom.js";
import { diff, differences } from "./diff.js";
import { METHODS, percent, seconds } from "./words.js";

// The rows of an answer with sides, itself as the last. chosen: the index of the selected row. choose(index)
export function paintSides(turn, method, chosen, choose) {
  const rows = [...turn.sides, { ...turn, method }];
  const longest = Math.max(...rows.map(elapsed), 0.001);
  const full = rows.find((row) => row.method === "full" && row.report && !row.pending);
  const list = element("ul", "rows", ...rows.map((row, at) => {
    return paintRow(row, longest, full, at === chosen, () => choose(at));
  }));
  const head = element("div", "row-head", element("span", "", "Time to the first token"), element("span", "", "Work"));
  head.setAttribute("aria-hidden", "true"); // each bar has its name
  return element("div", "sides", head, list);
}

// Moves the bars of what is under way, which grow until the first token comes.
export function growBars(place, turn) {
  const rows = [...turn.sides, turn];
  const longest = Math.max(...rows.map(elapsed), 0.001);
  place.querySelectorAll(".rows > li").forEach((item, at) => {
    item.querySelector(".time rect")?.setAttribute("width", share(elapsed(rows[at]), longest));
    const row = rows[at];
    if (row.pending && !row.report && row.started) item.querySelector(".time b").textContent = seconds(elapsed(row));
  });
}

function paintRow(row, longest, full, isChosen, choose) {
  const [name, meaning] = METHODS[row.method] ?? [row.method, ""];
  const time = elapsed(row);
  const item = element("li", row.report ? "done" : "", element("div", "row-name", element("b", "", name), element("span", "quiet", meaning)));
  item.append(
    bar("time", share(time, longest), time ? seconds(time) : "", `${name}: time to the first token`),
    bar("work", share(row.report?.computed_fraction ?? 0, 1), row.report ? percent(row.report.computed_fraction) : "",
      `${name}: share of the prompt's work that was computed`),
    element("div", "row-text", ...textOf(row, full)),
  );
  if (row.report) {
    const open = button("small", "What was computed", choose, `What was computed: ${name}`);
    open.setAttribute("aria-pressed", String(isChosen));
    item.append(open);
  }
  if (isChosen) item.classList.add("chosen");
  return item;
}

function bar(className, width, words, name) {
  const rect = svg("rect", { width, height: 10, rx: 2 });
  const picture = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${words || "not yet"}` }, rect);
  return element("div", `measure ${className}`, picture, element("b", "", words));
}

function share(value, most) {
  return Math.max(0, Math.min(100, (100 * value) / most));
}

function elapsed({ report, pending, started }) {
  if (report) return report.ttft_s;
  return pending && started ? (performance.now() - started) / 1000 : 0;
}

function textOf(row, full) {
  if (!row.content) return [element("span", "quiet", row.pending ? "…" : row.waiting ? "waits" : "")];
  if (!full || row.method === "full" || row.pending) return [row.content];
  const runs = diff(full.content, row.content);
  if (!runs) return [row.content];
  const number = differences(runs);
  const marked = runs.map(({ kind, text }) => (kind === "same" ? text : element(kind === "added" ? "ins" : "del", "", text)));
  const verdict = number ? "differs from full recompute" : "same as full recompute";
  return [...marked, element("span", `verdict ${number ? "differs" : "same"}`, verdict)];
}
