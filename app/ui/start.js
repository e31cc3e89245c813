// What the page offers before a search: examples, and the fields to sort by.

import { fieldName } from "./format.js";
import { browse, isEmoji, isInternal, loadCatalogue } from "./service.js";

const BUNDLED = ["crying cat", "red apple", "flag of japan", "woman running dark skin", "birthday", "angry"];
const LONGEST_EXAMPLE = 40; // characters

const known = new Map(); // path of a collection -> promise of its catalogue and {examples}

export function aboutCollection(base) {
  if (!known.has(base)) {
    const loading = load(base);
    loading.catch(() => known.delete(base)); // the first list shows the error
    known.set(base, loading);
  }
  return known.get(base);
}

async function load(base) {
  const about = await loadCatalogue(base);
  const fields = about.fields.filter(({ name }) => !isInternal(name, about));
  return { ...about, fields, examples: isEmoji(about) ? BUNDLED : examplesAmong((await browse(base, { k: 100 })).items) };
}

function examplesAmong(items) { // captions spread over the first items
  const found = items.flatMap(({ caption, category }) => [caption, category].find((words) => words && words.length <= LONGEST_EXAMPLE) ?? []);
  const fitting = [...new Set(found.map((words) => words.replace(/\s+/g, " ").trim()))];
  const step = Math.max(1, Math.floor(fitting.length / BUNDLED.length));
  return fitting.filter((_, i) => i % step === 0).slice(0, BUNDLED.length);
}

const $ = (id) => document.getElementById(id);

export function drawAbout({ examples, fields }) {
  $("examples").replaceChildren(...examples.map((words) => {
    return Object.assign(document.createElement("button"), { type: "button", dir: "auto", textContent: words, value: words });
  }));
  $("examples").hidden = !examples.length;
  const chosen = $("sort").value;
  $("sort").replaceChildren(
    new Option("best match", ""),
    ...fields.filter(({ name }) => name).flatMap(({ name, is_number }) => [
      new Option(`${fieldName(name)}, ${is_number ? "lowest first" : "A to Z"}`, name),
      new Option(`${fieldName(name)}, ${is_number ? "highest first" : "Z to A"}`, `-${name}`),
    ]),
  );
  $("sort").value = chosen;
}
