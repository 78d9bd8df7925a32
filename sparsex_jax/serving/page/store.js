// How full the store is: a bar, and its legend by state and by tier.

import { $, element, fillBar } from "./dom.js";
import { bytes, count, percent } from "./words.js";

const MEANING = {
  active: "of requests that run now",
  frozen: "documents, kept until they are forgotten",
  pinned: "kept for a time, as agents asked",
  base: "that mirrors are made of",
  spare: "that mirrors can make again",
  cached: "of earlier prompts, kept until room is needed",
  free: "empty",
};

const OF_MIRRORS = ["base", "spare"];

export function paintStore(store) {
  const { pages, free, page_size: size } = store;
  const states = Object.keys(MEANING).filter((state) => !OF_MIRRORS.includes(state) || store[state]);
  const parts = Object.fromEntries(states.map((state) => [state, store[state]]));
  for (const id of ["store-bar", "store-large"]) fillBar($(id), parts, (state) => state);
  $("store-text").textContent = `${pages - free} of ${pages} pages`;
  $("store-share").textContent = percent((pages - free) / pages);
  $("store-legend").replaceChildren(...states.map((state) =>
    element("li", "", element("span", `key ${state}`), element("b", "", `${state} `),
      `${count(parts[state] * size, "token")}, ${MEANING[state]}`)));
  paintTiers($("tiers"), store.tiers);
}

// With the device's store alone, there is nothing to show.
function paintTiers(list, tiers) {
  list.hidden = tiers.length < 2;
  list.replaceChildren(...tiers.map(({ name, bytes: used, limit, hit_tokens: hits }) => {
    const bar = element("span", "bar");
    fillBar(bar, { cached: used, free: limit - used }, (state) => state);
    return element("li", name, bar, `${name} ${bytes(used)} of ${bytes(limit)}, ${hits} tokens found`);
  }));
}
