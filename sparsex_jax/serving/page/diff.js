// Which words of two texts differ: a longest common subsequence.

const MOST_WORDS = 1500; // beyond that, the table of the comparison is too large

// Returns runs [{ kind: "same" | "added" | "missing", text }], from `before` to `after`; null if they are too long.
export function diff(before, after) {
  const a = wordsOf(before);
  const b = wordsOf(after);
  if (Math.max(a.length, b.length) > MOST_WORDS) return null;
  const common = commonLengths(a, b);
  const runs = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add(runs, "same", b[j++]);
      i++;
    } else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) add(runs, "missing", a[i++]);
    else add(runs, "added", b[j++]);
  }
  return runs;
}

export function differences(runs) {
  return runs.filter(({ kind, text }) => kind !== "same" && text.trim()).length;
}

// Words with the white space behind them.
function wordsOf(text) {
  return text.match(/\s*\S+\s*?(?=\s|$)|\s+$/g) ?? [];
}

// common[i][j]: how many words a[i..] and b[j..] have in common, in order.
function commonLengths(a, b) {
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  return common;
}

function add(runs, kind, text) {
  const last = runs.at(-1);
  if (last?.kind === kind) last.text += text;
  else runs.push({ kind, text });
}
