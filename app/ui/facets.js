// The values of fields with their counts, as buttons that filter: a click adds a filter, a second one removes it.
// A number with many values has a least and a greatest one to type instead. Counts follow the search.

import { EMPTY, hasFilter, hasSubject } from "./address.js";
import { conditionName, fieldName, number } from "./format.js";
import { loadFacets } from "./service.js";

const SHOWN = 8; // values of a field until "Show all"
const REST_MS = 250; // without another letter until the search is counted

const $ = (id) => document.getElementById(id);
const ranges = new Map(); // name of a field -> its section, which is kept so that typing in it goes on
const expanded = new Set(); // names of fields whose values are all shown
let shown = { base: null, key: null, isOpen: false, filter: {}, facets: [] };
let wanted = null; // what `drawFacets` was called with last
let toggle = null;
let wide = null; // MediaQueryList: there is room for a column
let isColumn = null;

// chosen: called with a field and a value, undefined to remove the filter.
export function prepareFacets(room, chosen) {
  [wide, toggle] = [room, chosen];
  $("filters").addEventListener("toggle", () => wanted && drawFacets(...wanted));
  $("filters").addEventListener("click", (event) => {
    const name = event.target.dataset?.expand;
    if (!name) return;
    if (!expanded.delete(name)) expanded.add(name);
    draw();
    document.querySelector(`[data-expand=${CSS.escape(name)}]`)?.focus();
  });
}

// A search is counted only while the filters are open.
export async function drawFacets(base, state) {
  wanted = [base, state];
  const { filter } = state, hasRoom = wide.matches && !(state.beside && hasSubject(state));
  if (hasRoom !== isColumn) $("filters").open = isColumn = hasRoom;
  const isOpen = $("filters").open;
  const key = JSON.stringify([base, filter, isOpen, ...(isOpen ? [state.q, state.words, state.without, state.like, state.unlike, state.picture] : [])]);
  if (key === shown.key) return;
  const isClick = base !== shown.base || isOpen !== shown.isOpen || JSON.stringify(filter) !== JSON.stringify(shown.filter);
  const mine = (shown = { base, key, isOpen, filter, facets: base === shown.base ? shown.facets : [] });
  draw(); // the click is seen at once
  if (!isClick) await new Promise((done) => setTimeout(done, REST_MS));
  if (mine !== shown) return;
  mine.facets = await loadFacets(base, isOpen ? state : EMPTY).catch(() => []); // the list shows the error
  if (mine === shown) draw();
}

function draw() {
  const { filter, facets } = shown;
  const isActive = (name, value) => JSON.stringify(filter[name]) === JSON.stringify(value);
  const known = new Set(facets.map(({ name }) => name));
  const others = Object.entries(filter).filter(([name]) => !known.has(name)).map(([name, value]) => ({ name, values: [{ value }] }));
  const had = document.activeElement?.dataset?.value;
  const place = $("facets"), sections = [...others, ...facets].map(({ name, values, range }) => {
    return range ? drawRange(name, range, filter[name]) : drawField(name, values, isActive);
  });
  for (const each of [...place.children]) if (!sections.includes(each)) each.remove();
  sections.forEach((each, at) => place.children[at] !== each && place.insertBefore(each, place.children[at] ?? null));
  if (had) [...$("facets").querySelectorAll("[data-value]")].find((node) => node.dataset.value === had)?.focus();
  $("active-filters").textContent = Object.entries(filter).map(([name, value]) => `${fieldName(name)}: ${conditionName(value)}`).join(", ");
  $("filters").hidden = !facets.length && !hasFilter({ filter });
}

function drawSection(name, content) {
  const section = document.createElement("section");
  section.append(Object.assign(document.createElement("h3"), { textContent: fieldName(name), dir: "auto" }), content);
  return section;
}

// range: the least and the greatest value of the gallery.
function drawRange(name, range, chosen) {
  if (!ranges.has(name)) ranges.set(name, makeRange(name));
  [...ranges.get(name).querySelectorAll("input")].forEach((input, at) => {
    input.placeholder = range[at];
    if (input !== document.activeElement) input.value = (at ? chosen?.lte ?? chosen?.lt : chosen?.gte ?? chosen?.gt) ?? "";
  });
  return ranges.get(name);
}

function makeRange(name) {
  const place = Object.assign(document.createElement("div"), { className: "between" });
  const inputs = ["Least", "Greatest"].map((which) => {
    const input = Object.assign(document.createElement("input"), { type: "number", step: "any", inputMode: "decimal" });
    input.ariaLabel = `${which} ${fieldName(name).toLowerCase()}`;
    input.addEventListener("change", () => {
      const [gte, lte] = inputs.map(({ value }) => (value === "" ? undefined : Number(value)));
      toggle(name, gte === undefined && lte === undefined ? undefined : { gte, lte });
    });
    return input;
  });
  place.append(inputs[0], " – ", inputs[1]);
  return drawSection(name, place);
}

function drawField(name, values, isActive) {
  const list = document.createElement("ul"), section = drawSection(name, list);
  const isAll = expanded.has(name) || values.length <= SHOWN + 1;
  const chosen = shown.filter[name];
  if (chosen !== undefined && !values.some(({ value }) => isActive(name, value))) values = [{ value: chosen, count: 0 }, ...values];
  const first = values.filter(({ value }, at) => isAll || at < SHOWN || isActive(name, value));
  list.append(...first.map(({ value, count }) => drawValue(name, value, count, isActive(name, value))));
  if (values.length > SHOWN + 1) {
    const more = Object.assign(document.createElement("button"), { type: "button", className: "link" });
    more.textContent = isAll ? "Show fewer" : `Show all ${values.length}`;
    more.dataset.expand = name;
    more.setAttribute("aria-expanded", isAll);
    section.append(more);
  }
  return section;
}

function drawValue(name, value, count, isActive) {
  const entry = document.createElement("li"), button = document.createElement("button");
  const label = Object.assign(document.createElement("span"), { textContent: conditionName(value), dir: "auto" });
  button.type = "button";
  button.title = isActive ? "Remove this filter" : "";
  button.dataset.value = `${name} ${JSON.stringify(value)}`;
  button.setAttribute("aria-pressed", isActive);
  button.append(label);
  if (count !== undefined) button.append(Object.assign(document.createElement("small"), { textContent: number(count) }));
  button.addEventListener("click", () => toggle(name, isActive ? undefined : value));
  entry.append(button);
  return entry;
}
