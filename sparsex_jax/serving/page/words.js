// Numbers and names as the page writes them.

export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

export function percent(share) {
  return `${Math.round(share * 100)} %`;
}

export function times(ratio) {
  return `${ratio < 10 ? ratio.toFixed(1) : Math.round(ratio)}×`;
}

// ratio: of the other time to this one
export function speedUp(ratio) {
  if (ratio > 0.95 && ratio < 1.05) return "1.0× as fast"; // less is noise
  return ratio >= 1 ? `${times(ratio)} faster` : `${times(1 / ratio)} slower`;
}

export function rate(tokensPerSecond) {
  return `${tokensPerSecond < 10 ? tokensPerSecond.toFixed(1) : Math.round(tokensPerSecond)} tokens/s`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(Math.floor(Math.log2(Math.max(number, 1)) / 10), units.length - 1);
  return `${Number((number / 1024 ** step).toPrecision(3))} ${units[step]}`;
}

export function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

export function shorten(text, length) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}

// The methods of reuse. "" is what the server was started with.
export const METHODS = {
  "": ["This server's method", "what the server was started with"],
  full: ["Full recompute", "computes every token in every layer"],
  prefix: ["Prefix cache", "reuses only what the prompt begins with"],
  naive: ["Paste", "pastes what was found, and repairs nothing"],
  epic: ["EPIC", "repairs the beginning of each piece"],
  cacheblend: ["CacheBlend", "repairs the tokens whose KV differs most"],
  sparsex: ["SparseX", "repairs the tokens that the new ones look at"],
  excerpt: ["Excerpt", "keeps the pieces that the new tokens look at"],
};

export function nameOfMethod(method) {
  return METHODS[method]?.[0] ?? method;
}
