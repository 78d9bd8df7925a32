// The form of settings.

import { element } from "./dom.js";
import { METHODS } from "./words.js";

export function paintSettings(form, settings, key) {
  const choices = Object.entries(METHODS);
  form.elements.method.replaceChildren(...choices.map(([method, [name]]) => {
    const option = element("option", "", name);
    option.value = method;
    return option;
  }));
  form.querySelector("#sides").append(...choices.filter(([method]) => method).map(([method, [name, meaning]]) => {
    const box = element("input");
    Object.assign(box, { type: "checkbox", name: "sides", value: method, checked: settings.sides.includes(method) });
    return element("label", "tick", box, element("span", "", element("b", "", name), ` ${meaning}`));
  }));
  for (const name of ["method", "tokens", "temperature", "salt"]) form.elements[name].value = settings[name];
  form.elements.measure.checked = settings.measure;
  form.elements.key.value = key;
}

export function readSettings(form, settings) {
  for (const name of ["method", "tokens", "temperature", "salt"]) settings[name] = form.elements[name].value;
  settings.measure = form.elements.measure.checked;
  settings.sides = [...form.elements.sides].filter((box) => box.checked).map((box) => box.value);
}
