// The layers by tokens of a prompt: what was computed, and what was taken from the store. Layer 0 is at the bottom.

import { svg } from "./dom.js";

const LEAST_COLUMN = 0.004; // of the width: an answer's tokens are to be seen behind a long prompt

// kinds: the kind of each token. layers: [{ start, end, computed: runs }], from the token map. answered: how many tokens
// the answer has so far, which all layers compute.
export function paintLayers(place, kinds, layers, answered) {
  const depth = layers.at(-1)?.end ?? 0;
  const width = kinds.length + (answered ? Math.max(answered, kinds.length * LEAST_COLUMN) : 0);
  place.setAttribute("viewBox", `0 0 ${width} ${depth}`);
  const columns = runsOf(kinds).map(({ value, start, length }) => rect(`kept ${value}`, start, 0, length, depth));
  const cells = layers.flatMap(({ start, end, computed }) => [
    ...computedCells(kinds, expand(computed), depth - end, end - start),
  ]);
  const answer = answered ? [rect("cell answer", kinds.length, 0, width - kinds.length, depth)] : [];
  place.replaceChildren(...columns, ...cells, ...answer);
}

// One path for each kind, since a long prompt may have thousands of runs.
function computedCells(kinds, computed, y, height) {
  const paths = {};
  const cells = kinds.map((kind, at) => (computed[at] ? (kind === "fresh" ? "fresh" : "recomputed") : ""));
  for (const { value, start, length } of runsOf(cells)) {
    if (value) paths[value] = `${paths[value] ?? ""}M${start} ${y}h${length}v${height}h-${length}z`;
  }
  return Object.entries(paths).map(([kind, d]) => svg("path", { class: `cell ${kind}`, d }));
}

function rect(className, x, y, width, height) {
  return svg("rect", { class: className, x, y, width, height });
}

export function runsOf(values) {
  const runs = [];
  values.forEach((value, start) => {
    const last = runs.at(-1);
    if (last?.value === value) last.length += 1;
    else runs.push({ value, start, length: 1 });
  });
  return runs;
}

export function expand(runs) {
  return runs.flatMap(([value, length]) => Array(length).fill(value));
}

// In words, for who cannot see the picture: what runs of layers computed how many of the tokens.
export function describeLayers(layers, tokens) {
  return layers.map(({ start, end, computed }) => {
    const number = expand(computed).filter(Boolean).length;
    const which = end - start === 1 ? `Layer ${start}` : `Layers ${start}–${end - 1}`;
    return `${which}: ${number} of ${tokens} tokens computed`;
  }).join(". ");
}
