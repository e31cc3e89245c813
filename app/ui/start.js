// What the page offers before a search: examples, categories, and the fields to sort by.

import { browse } from "./service.js";

const BUNDLED = ["crying cat", "red apple", "flag of japan", "woman running dark skin", "birthday", "angry"];
const LONGEST_EXAMPLE = 40; // characters
const LISTED = 200; // categories that the field suggests
const FEW = 40; // categories that are shown as buttons

const known = new Map(); // path of a collection -> promise of {examples, categories, fields}

export function aboutCollection(base) {
  if (!known.has(base)) {
    const loading = load(base);
    loading.catch(() => known.delete(base)); // the first list shows the error
    known.set(base, loading);
  }
  return known.get(base);
}

async function load(base) {
  const [page, bundled] = await Promise.all([browse(base, { k: 100 }), browse(base, { k: 1, category: BUNDLED[0] })]);
  return { examples: bundled.count ? BUNDLED : examplesAmong(page.items), categories: page.categories, fields: page.fields };
}

function examplesAmong(items) { // captions spread over the first items
  const found = items.flatMap(({ caption, category }) => [caption, category].find((words) => words && words.length <= LONGEST_EXAMPLE) ?? []);
  const fitting = [...new Set(found.map((words) => words.replace(/\s+/g, " ").trim()))];
  const step = Math.max(1, Math.floor(fitting.length / BUNDLED.length));
  return fitting.filter((_, i) => i % step === 0).slice(0, BUNDLED.length);
}

const $ = (id) => document.getElementById(id);

export function drawAbout({ examples, categories, fields }) {
  const button = (words, ...more) => {
    const node = Object.assign(document.createElement("button"), { type: "button", dir: "auto", textContent: words, value: words });
    node.append(...more);
    return node;
  };
  const count = (number) => Object.assign(document.createElement("small"), { textContent: ` ${number.toLocaleString()}` });
  $("examples").replaceChildren(...examples.map((words) => button(words)));
  $("examples").hidden = !examples.length;
  const few = categories.length > 1 && categories.length <= FEW ? categories : [];
  $("top-categories").replaceChildren(...few.map((each) => button(each.value, count(each.count))));
  $("top-categories").hidden = !few.length;
  $("categories").replaceChildren(...categories.slice(0, LISTED).map(({ value, count }) => new Option(`${count}`, value)));
  $("categories-label").hidden = !categories.length;
  const chosen = $("sort").value;
  $("sort").replaceChildren(
    new Option("best match", ""),
    ...fields.flatMap(({ name, is_number }) => [
      new Option(`${name}, ${is_number ? "lowest first" : "A to Z"}`, name),
      new Option(`${name}, ${is_number ? "highest first" : "Z to A"}`, `-${name}`),
    ]),
  );
  $("sort").value = chosen;
}
