// What the page offers before a search: examples, and the fields to sort by.

import { markGround } from "./cards.js";
import { fieldName } from "./format.js";
import { browse, clearImages, isEmoji, isInternal, loadCatalogue, showThumbnail } from "./service.js";

const BUNDLED = [ // words and the image that they find, in pairs of which each finds its own
  ["crying cat", "1f63f"], ["cat with tears of joy", "1f639"],
  ["crescent moon", "1f319"], ["full moon", "1f315"],
  ["woman running dark skin", "1f3c3-1f3ff-200d-2640"], ["man running light skin", "1f3c3-1f3fb-200d-2642"],
];
const SIDES = [192, 192]; // pixels of an example's image
const LONGEST_EXAMPLE = 40; // characters
const CAMERA = /^(?:img|dsc[fn]?|gopr|pxl|mvi|vid|wa|image|photo|screenshot|[\s\d_().-])*$/i; // a name that says nothing

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

// Returns names of images with their ids, spread over the first items: captions, else titles, else categories.
export function examplesAmong(items) {
  const fitting = new Map(items.flatMap(({ id, caption, category, metadata }) => {
    const names = [caption, metadata?.title, category].map((each) => (typeof each === "string" ? each : "").replace(/\s+/g, " ").replace(/ \d{3,}$/, "").trim());
    const words = names.find((each) => each.length <= LONGEST_EXAMPLE && !CAMERA.test(each));
    return words ? [[words, id]] : [];
  }));
  const step = Math.max(1, Math.floor(fitting.size / BUNDLED.length));
  return [...fitting].filter((_, i) => i % step === 0).slice(0, BUNDLED.length);
}

const $ = (id) => document.getElementById(id);

export function drawAbout({ examples, fields }, base) {
  clearImages($("examples"));
  $("examples").append(...examples.map(([words, id]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", value: words });
    const image = Object.assign(document.createElement("img"), { alt: "", width: 40, height: 40 });
    image.addEventListener("load", () => markGround(image, image));
    showThumbnail(image, base, id, SIDES, () => image.remove());
    button.append(image, Object.assign(document.createElement("span"), { textContent: words, dir: "auto" }));
    return button;
  }));
  $("examples").hidden = !examples.length;
  const chosen = $("sort").value;
  $("sort").replaceChildren(
    new Option("best match", ""),
    ...fields.filter(({ name }) => name).flatMap(({ name, is_number }) => [
      new Option(`${fieldName(name)}, ${is_number ? "lowest first" : name === "taken" ? "oldest first" : "A to Z"}`, name),
      new Option(`${fieldName(name)}, ${is_number ? "highest first" : name === "taken" ? "newest first" : "Z to A"}`, `-${name}`),
    ]),
  );
  $("sort").value = chosen;
}
