// Markdown as elements: what models write, and no more. HTML in it stays text, images become their links, and a link is
// one only if it leads to http, https or mailto.
//
// render() never fails: what is not Markdown is a paragraph. An answer that is not complete yet may end anywhere.

import { copyButton, element } from "./dom.js";

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^\s{0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^\s{0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8; // quotes and lists in each other
const LONGEST = 4000; // a line with marks: the patterns below look ahead from each mark

export function render(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

// The block that begins in a line, and the line behind it.
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = line.match(FENCE);
  if (fence) return code(lines, at, fence);
  const heading = line.match(HEADING);
  // The page has headings of its own above an answer, so an answer's begin at the third level.
  if (heading) return [element(`h${Math.min(heading[1].length + 2, 6)}`, "", ...inline(heading[2])), at + 1];
  if (RULE.test(line)) return [element("hr"), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) return table(lines, at);
  return paragraph(lines, at);
}

function code(lines, at, [, fence, language]) {
  let end = at + 1;
  const closes = new RegExp(`^\\s{0,3}${fence[0]}{${fence.length},}\\s*$`);
  while (end < lines.length && !closes.test(lines[end])) end++;
  const text = lines.slice(at + 1, end).join("\n");
  const block = element("pre", "", element("code", "", text));
  block.tabIndex = 0; // it may scroll sideways
  const bar = element("div", "code-bar", element("span", "", language), copyButton(() => text, "Copy this code"));
  return [element("div", "code", bar, block), end + 1];
}

function quote(lines, at, depth) {
  const end = endOf(lines, at, (line) => QUOTE.test(line));
  const text = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [element("blockquote", "", ...render(text, depth + 1)), end];
}

function list(lines, at, depth) {
  const [, indent, mark] = lines[at].match(ITEM);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(mark, 10) !== 1) made.start = parseInt(mark, 10);
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    if (!item || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== ordered) break;
    const end = endOfItem(lines, at + 1, item[1].length);
    const rest = lines.slice(at + 1, end).map((line) => unindent(line, item[1].length + 2));
    made.append(element("li", "", ...tight(render([item[3], ...rest].join("\n"), depth + 1))));
    at = end;
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at++;
  }
  return [made, at];
}

// What follows an item and is indented further belongs to it, and so do the lines of its paragraph.
function endOfItem(lines, at, indent) {
  while (at < lines.length) {
    const line = lines[at];
    const isDeeper = line.search(/\S/) > indent;
    if (!line.trim() ? lines[at + 1]?.search(/\S/) > indent + 1 : isDeeper || continues(line)) at++;
    else break;
  }
  return at;
}

// One paragraph in an item needs no margins.
function tight(blocks) {
  return blocks.flatMap((block, at) => (block.tagName === "P" && at === 0 ? [...block.childNodes] : [block]));
}

function unindent(line, most) {
  return line.slice(Math.min(most, Math.max(line.search(/\S|$/), 0)));
}

function table(lines, at) {
  const end = endOf(lines, at + 2, (line) => line.includes("|") && line.trim());
  const [head, , ...rows] = lines.slice(at, end).map(cells);
  const width = head.length;
  const row = (texts, tag) =>
    element("tr", "", ...Array.from({ length: width }, (_, column) => element(tag, "", ...inline(texts[column] ?? ""))));
  const made = element("table", "", element("thead", "", row(head, "th")));
  made.append(element("tbody", "", ...rows.map((texts) => row(texts, "td"))));
  const frame = element("div", "wide", made);
  frame.tabIndex = 0; // it may scroll sideways
  return [frame, end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.replace(/\\\|/g, "|").trim());
}

function paragraph(lines, at) {
  const end = endOf(lines, at + 1, continues);
  const made = element("p");
  lines.slice(at, end).forEach((line, number) => {
    if (number) made.append(element("br"));
    made.append(...inline(line.trim()));
  });
  return [made, end];
}

function continues(line) {
  return line.trim() && ![FENCE, HEADING, RULE, QUOTE, ITEM].some((block) => block.test(line));
}

function endOf(lines, at, belongs) {
  while (at < lines.length && belongs(lines[at])) at++;
  return at;
}

// In a line: [pattern, the nodes of a match]. The first pattern that matches at a place wins.
const INLINE = [
  [/\\([\\`*_{}[\]()#+\-.!|~<>])/y, ([, sign]) => [sign]],
  [/(`+)(?!`)(.+?)(?<!`)\1(?!`)/y, ([, , text]) => [element("code", "", text.replace(/^ (.*\S.*) $/, "$1"))]],
  [/!?\[((?:[^[\]\\]|\\.)*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/y,
    ([whole, text, to], depth) => link(to, inline(text, depth + 1), whole)],
  [/<(https?:\/\/[^\s<>]+)>/y, ([whole, to]) => link(to, [to], whole)],
  [/https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/y, ([to]) => link(to, [to], to)],
  [/\*\*(?=\S)(.+?)(?<=\S)\*\*/y, ([, text], depth) => [element("strong", "", ...inline(text, depth + 1))]],
  [/(?<!\w)__(?=\S)(.+?)(?<=\S)__(?!\w)/y, ([, text], depth) => [element("strong", "", ...inline(text, depth + 1))]],
  [/\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?!\*)/y, ([, text], depth) => [element("em", "", ...inline(text, depth + 1))]],
  [/(?<!\w)_(?=[^\s_])(.+?)(?<=[^\s_])_(?!\w)/y, ([, text], depth) => [element("em", "", ...inline(text, depth + 1))]],
  [/~~(?=\S)(.+?)(?<=\S)~~/y, ([, text], depth) => [element("del", "", ...inline(text, depth + 1))]],
];
const SPECIAL = /[\\`![<h*_~]/g; // where a pattern may begin

function inline(text, depth = 0) {
  if (depth > DEEPEST || text.length > LONGEST) return [text];
  const nodes = [];
  let plain = 0; // where the text that is not yet in nodes begins
  SPECIAL.lastIndex = 0;
  for (let special = SPECIAL.exec(text); special; special = SPECIAL.exec(text)) {
    const at = special.index;
    const found = matchAt(text, at);
    if (!found) continue;
    const [match, make] = found;
    nodes.push(text.slice(plain, at), ...make(match, depth));
    plain = SPECIAL.lastIndex = at + match[0].length;
  }
  return [...nodes, text.slice(plain)].filter((node) => node !== "");
}

function matchAt(text, at) {
  for (const [pattern, make] of INLINE) {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) return [match, make];
  }
  return null;
}

function link(to, children, whole) {
  if (!isSafe(to)) return [whole];
  const made = element("a", "", ...(children.length ? children : [to]));
  made.href = to;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return [made];
}

function isSafe(to) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(to).protocol);
  } catch {
    return false; // relative ones would lead into this server
  }
}
