// The search page.
//
// - The address holds the query (#q=words&k=24 or #item=id&k=24), the collection (in=), a second collection to compare
//   with (beside=), a category, `without` and `explain`, so links can be shared and "back" works.
// - An image does not fit into an address; it is kept in memory under a name (#picture=lx3k2a) until the page is closed.
// - Every request aborts the previous one, and stale responses are dropped.
// - Searches start once the collections are loaded; text typed before that waits.

import { makeCards, markPlaces } from "./cards.js";
import { drawWords } from "./explain.js";

const $ = (id) => document.getElementById(id);
const form = $("form"), query = $("query"), file = $("file"), count = $("k"), explain = $("explain"), without = $("without");
const results = $("results"), status = $("status"), error = $("error"), empty = $("empty"), nothing = $("nothing");
const collection = $("collection"), beside = $("beside"), other = $("other");
const TYPING_MS = 180;
const BUNDLED = ["crying cat", "red apple", "flag of japan", "woman running dark skin", "birthday", "angry"];
const LONGEST_EXAMPLE = 40; // characters
const SLOW_MS = 500;
const UNREADABLE = "This file cannot be read.";

const images = new Map(); // name -> {file, url}
const captions = new Map(); // collection and id -> caption of each item shown so far
let collections = []; // as GET /collections lists them, the default one first
let ready = false; // the collections are loaded
let suggested = null; // the collection that the examples belong to
let typing = 0;
let running = null;

function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  const state = { q: params.get("q") ?? "", explain: params.get("explain") };
  for (const name of ["item", "picture", "k", "in", "beside", "category", "without"]) state[name] = params.get(name);
  state.isLost = state.picture !== null && !images.has(state.picture); // after a reload
  if (state.isLost) state.picture = null;
  return state;
}

function go(state, { replace = false } = {}) {
  const parts = new URLSearchParams();
  for (const name of ["q", "item", "picture"]) if (state[name]) parts.set(name, state[name]);
  if ([...parts].length) {
    parts.set("k", count.value);
    if (state.category) parts.set("category", state.category);
    if (without.value.trim()) parts.set("without", without.value.trim());
    if (explain.checked) parts.set("explain", "1");
  }
  const where = ready ? collection.value : readAddress().in;
  if (where && where !== collections[0]?.name) parts.set("in", where);
  const second = state.beside ?? (ready ? beside.value : readAddress().beside);
  if (second && second !== where) parts.set("beside", second);
  const address = [...parts].length ? `#${parts}` : location.pathname + location.search;
  if (`#${parts}` !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", address);
  show();
}

// Sets an input's text; while the user types in it, surrounding spaces stay.
function setText(input, words) {
  if (document.activeElement !== input || input.value.trim() !== words) input.value = words;
}

const captionOf = (id) => captions.get(base() + id);
const base = (name = collection.value) =>
  name && name !== collections[0]?.name ? `collections/${encodeURIComponent(name)}/` : "";

// Returns the body of a search response, with `ok` and `status`.
async function search(state, signal, name) {
  const response = await send(state, signal, base(name));
  return { status: response.status, ...(await response.json().catch(() => ({}))), ok: response.ok };
}

async function send(state, signal, from) {
  const options = { k: Number(count.value) };
  if (state.category) options.filter = { category: state.category };
  if (state.without) options.without = state.without;
  if (explain.checked) options.explain = true;
  if (state.picture) {
    const body = new FormData(), { file } = images.get(state.picture);
    await file.slice(0, 1).arrayBuffer().catch(() => { throw UNREADABLE; }); // a folder, or deleted
    body.append("file", file);
    for (const [name, value] of Object.entries(options)) body.append(name, name === "without" ? value : JSON.stringify(value));
    return fetch(`${from}search/image`, { method: "POST", body, signal });
  }
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ ...options, ...(state.item ? { more_like: [state.item] } : { query: state.q }) });
  return fetch(`${from}search/text`, { method: "POST", headers, body, signal });
}

async function show() {
  clearTimeout(typing);
  running?.abort();
  if (!ready) return;
  const state = readAddress();
  if (state.k && [...count.options].some((option) => option.value === state.k)) count.value = state.k;
  collection.value = collections.some(({ name }) => name === state.in) ? state.in : (collections[0]?.name ?? "");
  offerCompared(state.beside);
  if (suggested !== base()) suggest();
  if (state.q || state.item || state.picture) { // a link without a query leaves the options alone
    explain.checked = state.explain === "1";
    setText(without, state.without ?? "");
  }
  $("category").hidden = !state.category;
  $("category").textContent = state.category ?? "";
  setText(query, state.q);
  chip(state);
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button.textContent === state.q);
  const subject = setTitle(state);
  for (const name of [state.in, state.beside]) {
    if (name && collections.every((each) => each.name !== name)) return fail(`There is no collection “${name}”.`);
  }
  if (state.isLost) return fail("An image is not part of a link and is lost when the page is closed. Choose it again.");
  if (!subject) return draw(null);

  const mine = (running = new AbortController());
  results.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => {
    status.textContent = "Searching…";
    error.hidden = true; // it belongs to the previous search
  }, SLOW_MS);
  try {
    const first = search(state, mine.signal, collection.value);
    const compared = async () => { // explanations are slow: run them one after the other
      if (explain.checked) await first;
      return search(state, mine.signal, beside.value);
    };
    const [response, second] = await Promise.all([first, beside.value ? compared().catch(() => ({})) : null]);
    if (state.item && captionOf(state.item) === undefined) await loadCaption(state, mine.signal);
    if (mine.signal.aborted) return;
    if (!response.ok) return fail(response.detail || `Error ${response.status}`);
    draw(response, state);
    if (second) drawCompared(second, state, response);
  } catch (reason) {
    if (!mine.signal.aborted) fail(reason === UNREADABLE ? UNREADABLE : "The service cannot be reached.");
  } finally {
    clearTimeout(slow);
    if (running === mine) results.removeAttribute("aria-busy");
  }
}

async function loadCaption(state, signal) { // a shared link: the item has not been shown yet
  const item = await fetch(`${base()}items/${encodeURIComponent(state.item)}`, { signal });
  if (!item.ok) return;
  captions.set(base() + state.item, (await item.json()).caption || state.item);
  if (signal.aborted) return;
  chip(state);
  setTitle(state);
}

function setTitle(state) { // returns the subject of the search, "" without one
  const subject = state.q || (state.picture || state.item ? $("chip-label").textContent : "");
  document.title = subject ? `${subject} · Image search` : "Image search";
  return subject;
}

function draw(response, state) {
  error.hidden = nothing.hidden = true;
  empty.hidden = response !== null;
  drawWords($("words"), response?.words);
  if (response === null) {
    results.removeAttribute("aria-busy");
    place([]);
    status.textContent = "";
    return;
  }
  const cards = makeList(response, state, collection.value);
  place(cards.cards);
  if (!cards.fitting) showNoMatch(state, response.results.length);
  status.textContent = facts(response, cards.fitting);
}

function makeList(response, state, name, to = name) { // a click searches the collection `to`
  for (const { id, caption } of response.results) captions.set(base(name) + id, caption || id);
  return makeCards(response.results, {
    items: `${base(name)}items`,
    minScore: minScoreOf(state, name),
    more: ({ id }) => {
      scrollTo({ top: 0 });
      const swapped = to !== collection.value ? { beside: collection.value } : {};
      collection.value = to;
      go({ item: id, ...swapped });
    },
    only: ({ category }) => go({ ...readAddress(), category }),
  });
}

function facts(response, fitting) {
  const n = response.results.length;
  const all = [`${n} ${n === 1 ? "result" : "results"}`, `${response.took_ms.toFixed(1)} ms`];
  if (fitting < n) all[0] += `, ${fitting || "none"} above the cut-off`;
  if (response.cached) all.push("cached");
  return [...all, `index version ${response.index_version}`].join(" · ");
}

// Draws the second collection's results; marks both lists if they share a gallery.
function drawCompared(response, state, first) {
  other.hidden = $("results-name").hidden = false;
  document.body.classList.add("beside");
  $("results-name").textContent = collection.value;
  $("other-name").textContent = beside.value;
  if (!response.ok) {
    $("other-status").textContent = response.detail || (response.status ? `Error ${response.status}` : "The service cannot be reached.");
    return;
  }
  const ids = new Set(first.results.map(({ id }) => id));
  const alike = response.results.some(({ id }) => ids.has(id));
  const { cards, fitting } = makeList(response, state, beside.value, alike ? collection.value : beside.value);
  $("others").replaceChildren(...cards);
  markPlaces([...results.children], response.results, beside.value);
  markPlaces(cards, first.results, collection.value);
  $("other-status").textContent = facts(response, fitting);
}

function hideCompared() {
  other.hidden = $("results-name").hidden = true;
  document.body.classList.remove("beside");
  $("others").replaceChildren();
}

function offerCompared(state) { // every other collection
  const names = collections.map(({ name }) => name).filter((name) => name !== collection.value);
  beside.replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
  beside.value = names.includes(state) ? state : "";
}

// Returns the calibrated cut-off, which applies to plain text searches; -Infinity without one.
function minScoreOf(state, name) {
  const words = state.q && !state.item && !state.picture && !state.without;
  const found = words ? collections.find((each) => each.name === name)?.min_score : null;
  return found ?? -Infinity;
}

function showNoMatch(state, shown) {
  const where = state.category ? ` in the category “${state.category}”` : "";
  nothing.querySelector(".lead").textContent = state.q ? `No match for “${state.q}”${where}` : `No items${where}`;
  nothing.querySelector(".why").textContent = shown
    ? "These are the nearest items, but their scores are below those of nearly all correct matches."
    : "";
  nothing.hidden = false;
}

function fail(message) {
  error.textContent = message;
  error.hidden = false;
  empty.hidden = nothing.hidden = true;
  drawWords($("words"), null);
  status.textContent = "";
  place([]);
}

function place(cards) { // keeps keyboard focus among the results
  const within = $("lists").contains(document.activeElement);
  hideCompared();
  results.replaceChildren(...cards);
  if (within) results.focus({ preventScroll: true });
}

function chip(state) {
  $("chip").hidden = !state.item && !state.picture;
  if (state.picture) {
    const { file, url } = images.get(state.picture);
    $("chip-image").src = url;
    $("chip-label").textContent = $("chip").title = file.name || "pasted image";
  } else if (state.item) {
    $("chip-image").src = `${base()}items/${encodeURIComponent(state.item)}/image`;
    $("chip-label").textContent = $("chip").title = `more like ${captionOf(state.item) ?? state.item}`;
  } else {
    $("chip-image").removeAttribute("src");
  }
  query.placeholder = $("chip").hidden ? "What does the image show?" : "Or search by text";
}

function searchBy(chosen) {
  if (!chosen) return;
  const name = `${Date.now().toString(36)}${images.size}`; // unique across reloads
  images.set(name, { file: chosen, url: URL.createObjectURL(chosen) });
  go({ ...readAddress(), q: "", item: null, picture: name });
}

const imageAmong = (files) => [...files].find((each) => each.type.startsWith("image/"));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.value.trim()) go({ q: query.value.trim(), category: readAddress().category });
});
for (const input of [query, without]) {
  input.addEventListener("input", () => {
    clearTimeout(typing);
    const before = readAddress();
    typing = setTimeout(() => {
      if (!ready) return; // `begin` reads the typed text
      const q = query.value.trim();
      if (q !== before.q) go({ q, category: before.category }, { replace: Boolean(before.q && q) });
      else if (without.value.trim() !== (before.without ?? "")) go(before, { replace: true });
    }, TYPING_MS);
  });
}
count.addEventListener("change", () => go(readAddress(), { replace: true }));
explain.addEventListener("change", () => go(readAddress(), { replace: true }));
beside.addEventListener("change", () => go({ ...readAddress(), beside: beside.value }));
collection.addEventListener("change", () => {
  const { q, picture, in: before, beside: second } = readAddress();
  go({ q, picture, beside: second === collection.value ? before ?? collections[0].name : second });
});
$("category").addEventListener("click", () => {
  results.focus({ preventScroll: true });
  go({ ...readAddress(), category: null });
});
$("examples").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) go({ q: event.target.textContent });
});
$("pick").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  searchBy(file.files[0]);
  file.value = "";
});
$("chip-clear").addEventListener("click", () => {
  go({});
  query.focus();
});
addEventListener("popstate", show);
addEventListener("paste", (event) => {
  const chosen = imageAmong(event.clipboardData.files);
  const words = event.target === query && event.clipboardData.types.includes("text/plain"); // office programs copy both
  if (chosen && !words) {
    event.preventDefault();
    searchBy(chosen);
  }
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && event.target !== query && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    query.focus();
    query.select();
  }
});

let depth = 0; // dragenter and dragleave also fire for every child
const hasFile = (event) => [...event.dataTransfer.types].includes("Files");
const drag = (change) => document.body.classList.toggle("dragging", (depth = Math.max(0, change)) > 0);
addEventListener("dragenter", (event) => hasFile(event) && drag(depth + 1));
addEventListener("dragleave", (event) => hasFile(event) && drag(depth - 1));
addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!hasFile(event)) return;
  event.preventDefault();
  drag(0);
  const { files } = event.dataTransfer;
  searchBy(imageAmong(files) ?? files[0]);
});

async function suggest() { // examples: captions of the gallery, or fixed ones for the bundled gallery
  const from = (suggested = base());
  const items = async (options) => {
    const response = await fetch(`${from}items?${new URLSearchParams(options)}`);
    return response.ok ? response.json() : { count: 0, items: [] };
  };
  let examples = [];
  try {
    const bundled = await items({ k: 1, filter: JSON.stringify({ category: BUNDLED[0] }) });
    if (bundled.count) examples = BUNDLED;
    else {
      const found = (await items({ k: 100 })).items.flatMap(({ caption, category }) =>
        [caption, category].find((words) => words && words.length <= LONGEST_EXAMPLE) ?? []);
      const fitting = [...new Set(found.map((words) => words.replace(/\s+/g, " ").trim()))];
      const step = Math.max(1, Math.floor(fitting.length / BUNDLED.length));
      examples = fitting.filter((_, i) => i % step === 0).slice(0, BUNDLED.length);
    }
  } catch {
    // the first search shows the error
  }
  if (from !== base()) return; // the collection changed meanwhile
  const button = (textContent) =>
    Object.assign(document.createElement("button"), { type: "button", dir: "auto", textContent, ariaPressed: textContent === readAddress().q });
  $("examples").replaceChildren(...examples.map(button));
  $("examples").hidden = !examples.length;
}

async function begin() {
  for (let wait = 1000; !ready; wait = Math.min(2 * wait, 15000)) {
    const response = await fetch("collections").catch(() => null);
    if (response?.ok) {
      collections = (await response.json()).collections;
      ready = true;
    } else {
      const problem = await response?.json().catch(() => null);
      fail(problem?.detail || (response ? `Error ${response.status}` : "The service cannot be reached."));
      if (response?.status === 401) return;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  error.hidden = true;
  collection.replaceChildren(...collections.map(({ name }) => new Option(name, name)));
  $("where").hidden = $("versus").hidden = collections.length < 2;
  const { in: where, category } = readAddress(), typed = query.value.trim();
  if (collections.some(({ name }) => name === where)) collection.value = where;
  if (typed) go({ q: typed, category });
  else show();
}

without.value = readAddress().without ?? "";
begin();
