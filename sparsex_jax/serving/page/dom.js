// Making elements. Texts become text nodes, so that nothing in them is markup.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function button(className, text, onClick, label) {
  const made = element("button", className, text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

// parts: { class: size }. nameOf(class) is for the tooltip.
export function fillBar(bar, parts, nameOf) {
  bar.replaceChildren(
    ...Object.entries(parts).filter(([, size]) => size > 0).map(([name, size]) => {
      const part = element("span", name);
      part.style.flexGrow = size;
      part.title = `${nameOf(name)}: ${size}`;
      return part;
    }),
  );
}

// Outside of https and localhost there is no clipboard; a selection can be copied everywhere.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea", "unseen", text);
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// A button that copies, and says so for a moment.
export function copyButton(text, label) {
  const made = button("small", "Copy", async () => {
    await copy(text());
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  }, label);
  return made;
}
