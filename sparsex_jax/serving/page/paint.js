// Shows a report as bars, colours and numbers. Texts become text nodes, so that nothing in them is markup.

export const KINDS = ["prefix", "approximate_prefix", "reused", "recomputed", "fresh", "omitted"];
const MEANING = {
  prefix: "stored as the beginning of a prompt, used as it is",
  approximate_prefix: "stored as the beginning of a prompt, as its approximate prefill left it",
  reused: "found in the store and copied to this position",
  recomputed: "found in the store, but computed again",
  fresh: "not found, so computed",
  omitted: "looked at by the new tokens, and left out of what is answered from",
};

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The kind of each token of the prompt, one of KINDS.
export function kindsOf(map) {
  const active = expand(map.active);
  return expand(map.kind).map((kind, at) => (kind === "reused" && active[at] ? "recomputed" : kind));
}

function wordsOf(kind) {
  return kind.replace("_", " ");
}

function expand(runs) {
  return runs.flatMap(([value, length]) => Array(length).fill(value));
}

export function countKinds(kinds) {
  return Object.fromEntries(KINDS.map((kind) => [kind, kinds.filter((each) => each === kind).length]));
}

// parts: { name: size }
export function paintBar(bar, parts) {
  bar.replaceChildren(
    ...Object.entries(parts).filter(([, size]) => size > 0).map(([name, size]) => {
      const part = element("span", name);
      part.style.flexGrow = size;
      part.title = `${wordsOf(name)}: ${size}`;
      return part;
    }),
  );
}

export function paintLegend(list, counts) {
  list.replaceChildren(
    ...KINDS.map((kind) => {
      const item = element("li");
      item.title = MEANING[kind];
      item.append(element("span", `key ${kind}`), `${wordsOf(kind)} ${counts[kind]}`);
      return item;
    }),
  );
}

export function paintPrompt(place, map, kinds) {
  place.replaceChildren(
    ...map.text.map((text, at) => {
      const token = element("span", `token ${kinds[at]}`, text);
      token.title = `token ${at}: ${wordsOf(kinds[at])}, ${MEANING[kinds[at]]}`;
      return token;
    }),
  );
}

// sourceOf: a function from a segment's text to a description of its donor
export function paintSegments(body, report, sourceOf) {
  body.replaceChildren(
    ...report.segments.map((segment) => {
      const text = report.token_map.text.slice(segment.start, segment.start + segment.length).join("");
      const row = element("tr");
      row.append(
        element("td", "", range(segment.start, segment.length)),
        element("td", "", range(segment.donor_start, segment.length)),
        element("td", "", sourceOf(text)),
        element("td", "", segment.tier ?? "device"), // a report that was kept by an older page has none
        element("td", "", shorten(text, 90)),
      );
      return row;
    }),
  );
}

// tiers: as the server gives them. With the device's store alone, there is nothing to show.
export function paintTiers(list, tiers) {
  list.hidden = tiers.length < 2;
  list.replaceChildren(
    ...tiers.map(({ name, bytes: used, limit, hit_tokens: hits }) => {
      const item = element("li", name);
      const bar = element("span", "bar");
      paintBar(bar, { cached: used, free: limit - used });
      item.append(bar, `${name} ${bytes(used)} of ${bytes(limit)}, ${hits} tokens found`);
      return item;
    }),
  );
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(Math.floor(Math.log2(Math.max(number, 1)) / 10), units.length - 1);
  return `${Number((number / 1024 ** step).toPrecision(3))} ${units[step]}`;
}

function range(start, length) {
  return `${start}–${start + length - 1}`;
}

export function shorten(text, length) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}

export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

export function percent(share) {
  return `${Math.round(share * 100)} %`;
}
