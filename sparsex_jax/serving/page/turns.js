// The chat: questions with their documents as chips, answers with Markdown, thoughts folded, and their figures.

import { $, button, copyButton, element } from "./dom.js";
import { state } from "./keep.js";
import { render } from "./markdown.js";
import { growBars, paintSides } from "./sides.js";
import { count, nameOfMethod, percent, rate, seconds, speedUp } from "./words.js";

const elements = new WeakMap(); // of turns
const unfolded = new WeakSet(); // turns whose thought is open

// actions: { choose(turn, side), retry() }
export function paintTurns(actions, isBusy) {
  const exchanges = []; // a question, which stays in sight, and what answers it
  for (const turn of state.turns) {
    const made = turn.role === "user" ? question(turn) : answer(turn, turn === state.turns.at(-1), actions, isBusy);
    elements.set(turn, made);
    if (turn.role === "user" || !exchanges.length) exchanges.push(element("div", "exchange", ...chipsOf(turn)));
    exchanges.at(-1).append(made);
  }
  $("turns").replaceChildren(...exchanges);
  letScroll();
}

// A long question scrolls in its place, so the keyboard must reach it.
function letScroll() {
  for (const each of document.querySelectorAll(".turn.user")) each.tabIndex = each.scrollHeight > each.clientHeight ? 0 : -1;
}
addEventListener("resize", letScroll);

export function paintTurn(turn, actions, isBusy) {
  const old = elements.get(turn);
  if (!old?.isConnected) return;
  const made = answer(turn, turn === state.turns.at(-1), actions, isBusy);
  old.replaceWith(made);
  elements.set(turn, made);
}

// While the first token is awaited, the time goes on.
export function tickTurn(turn) {
  const shown = elements.get(turn);
  if (!shown) return;
  if (turn.sides) growBars(shown, turn);
  const clock = shown.querySelector(".clock");
  if (clock && turn.started) clock.textContent = seconds((performance.now() - turn.started) / 1000);
}

function question({ question, content }) {
  const made = element("article", "turn user", element("div", "text", question ?? content));
  made.setAttribute("aria-label", "Question");
  return made;
}

function chipsOf({ documents = [] }) {
  if (!documents.length) return [];
  const list = element("ul", "chips", ...documents.map(({ name, tokens }) =>
    element("li", "chip", name, tokens ? element("span", "quiet", ` ${count(tokens, "token")}`) : null)));
  list.setAttribute("aria-label", "Documents before this question");
  return [list];
}

function answer(turn, isLast, actions, isBusy) {
  const made = element("article", "turn assistant");
  made.setAttribute("aria-label", "Answer");
  const isChosen = state.turns[state.chosen] === turn;
  if (turn.sides) {
    const chosen = !isChosen ? -1 : state.side ?? turn.sides.length;
    made.append(paintSides(turn, state.settings.method, chosen, (side) => actions.choose(turn, side < turn.sides.length ? side : null)));
  } else made.append(...thought(turn), body(turn));
  const row = element("div", "under", facts(turn, isChosen, actions));
  if (!turn.pending && !turn.waiting) {
    row.append(copyButton(() => turn.content, "Copy this answer"));
    if (isLast && !isBusy) row.append(button("small", "Retry", actions.retry, "Retry with another seed"));
  }
  made.append(row);
  return made;
}

function body(turn) {
  if (turn.content) return element("div", "text", ...render(turn.content));
  if (turn.pending) return element("div", "text waiting", turn.thought ? "" : element("span", "clock", "…"));
  return element("div", "text quiet", "(no text)");
}

function thought(turn) {
  if (!turn.thought) return [];
  const fold = element("details", "thought", element("summary", "", turn.pending && !turn.content ? "Thinking…" : "Thought"));
  fold.append(element("div", "", turn.thought));
  fold.open = unfolded.has(turn);
  fold.addEventListener("toggle", () => (fold.open ? unfolded.add(turn) : unfolded.delete(turn)));
  return [fold];
}

// What an answer took, and the way to its report.
function facts(turn, isChosen, { choose }) {
  const words = turn.sides ? [] : figures(turn);
  if (turn.cut) words.push(turn.cut);
  if (!words.length) return "";
  if (!turn.report) return element("span", "facts", words.join(" · "));
  const made = button("facts", words.join(" · "), () => choose(turn, null));
  made.setAttribute("aria-pressed", String(isChosen));
  made.title = "Show what was computed";
  return made;
}

function figures({ report, full, speed, pending }) {
  if (!report) return [];
  const words = [`first token after ${seconds(report.ttft_s)}`, `${percent(report.computed_fraction)} computed`];
  if (full) words.push(speedUp(full.ttft_s / report.ttft_s));
  if (speed && !pending) words.push(rate(speed));
  return words;
}

export function describe(turn) {
  return turn.sides ? `${turn.sides.length + 1} methods on the same prompt. ${nameOfMethod(state.settings.method)}: ${turn.content}` : turn.content;
}
