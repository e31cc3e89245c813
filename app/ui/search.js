// The search page. The address holds the query (#q=words&k=24 or #item=id&k=24), the collection (in=), the one whose
// answer stands beside (beside=), a category, words for what is not wanted and whether to explain, so it can be shared and "back" works; a picture
// cannot be put into an address and is kept in memory under a name (#picture=lx3k2a) as long as the page lives.
// Every request aborts the one before; an answer that is no longer wanted is never shown. Nothing is searched before the
// collections are known; what is typed meanwhile waits.

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

const pictures = new Map(); // name -> {file, url}
const captions = new Map(); // collection and id -> caption of the items seen so far
let collections = []; // as GET /collections lists them, the default one first
let ready = false; // they are known
let suggested = null; // the collection that the examples are of
let typing = 0;
let running = null;

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const wanted = { q: given.get("q") ?? "", explain: given.get("explain") };
  for (const name of ["item", "picture", "k", "in", "beside", "category", "without"]) wanted[name] = given.get(name);
  wanted.lost = wanted.picture !== null && !pictures.has(wanted.picture); // the page was reloaded
  if (wanted.lost) wanted.picture = null;
  return wanted;
}

function go(wanted, { replace = false } = {}) {
  const parts = new URLSearchParams();
  for (const name of ["q", "item", "picture"]) if (wanted[name]) parts.set(name, wanted[name]);
  if ([...parts].length) {
    parts.set("k", count.value);
    if (wanted.category) parts.set("category", wanted.category);
    if (without.value.trim()) parts.set("without", without.value.trim());
    if (explain.checked) parts.set("explain", "1");
  }
  const where = ready ? collection.value : read().in;
  if (where && where !== collections[0]?.name) parts.set("in", where);
  const second = wanted.beside ?? (ready ? beside.value : read().beside);
  if (second && second !== where) parts.set("beside", second);
  const address = [...parts].length ? `#${parts}` : location.pathname + location.search;
  if (`#${parts}` !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", address);
  show();
}

// Whoever is typing keeps the spaces.
function keep(input, words) {
  if (document.activeElement !== input || input.value.trim() !== words) input.value = words;
}

const known = (id) => captions.get(base() + id);
const base = (name = collection.value) =>
  name && name !== collections[0]?.name ? `collections/${encodeURIComponent(name)}/` : "";

// What the service says of a query in one collection: its answer's fields, and `ok` as of the response.
async function ask(wanted, signal, name) {
  const answer = await send(wanted, signal, base(name));
  return { status: answer.status, ...(await answer.json().catch(() => ({}))), ok: answer.ok };
}

async function send(wanted, signal, from) {
  const options = { k: Number(count.value) };
  if (wanted.category) options.filter = { category: wanted.category };
  if (wanted.without) options.without = wanted.without;
  if (explain.checked) options.explain = true;
  if (wanted.picture) {
    const body = new FormData(), { file } = pictures.get(wanted.picture);
    await file.slice(0, 1).arrayBuffer().catch(() => { throw UNREADABLE; }); // a folder, or gone since
    body.append("file", file);
    for (const [name, value] of Object.entries(options)) body.append(name, name === "without" ? value : JSON.stringify(value));
    return fetch(`${from}search/image`, { method: "POST", body, signal });
  }
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ ...options, ...(wanted.item ? { more_like: [wanted.item] } : { query: wanted.q }) });
  return fetch(`${from}search/text`, { method: "POST", headers, body, signal });
}

async function show() {
  clearTimeout(typing);
  running?.abort();
  if (!ready) return;
  const wanted = read();
  if (wanted.k && [...count.options].some((option) => option.value === wanted.k)) count.value = wanted.k;
  collection.value = collections.some(({ name }) => name === wanted.in) ? wanted.in : (collections[0]?.name ?? "");
  offerBeside(wanted.beside);
  if (suggested !== base()) suggest();
  if (wanted.q || wanted.item || wanted.picture) { // until then the options wait for it
    explain.checked = wanted.explain === "1";
    keep(without, wanted.without ?? "");
  }
  $("category").hidden = !wanted.category;
  $("category").textContent = wanted.category ?? "";
  keep(query, wanted.q);
  chip(wanted);
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button.textContent === wanted.q);
  const subject = entitle(wanted);
  for (const name of [wanted.in, wanted.beside]) {
    if (name && collections.every((each) => each.name !== name)) return fail(`There is no collection “${name}” here.`);
  }
  if (wanted.lost) return fail("A picture is not part of a link, and is gone with the page that it was given to. Choose it again.");
  if (!subject) return draw(null);

  const mine = (running = new AbortController());
  results.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => {
    status.textContent = "Searching…";
    error.hidden = true; // it spoke of the search before
  }, SLOW_MS);
  try {
    const asked = ask(wanted, mine.signal, collection.value);
    const beyond = async () => { // explanations take long: one after the other, so that each has its time
      if (explain.checked) await asked;
      return ask(wanted, mine.signal, beside.value);
    };
    const [answer, second] = await Promise.all([asked, beside.value ? beyond().catch(() => ({})) : null]);
    if (wanted.item && known(wanted.item) === undefined) await name(wanted, mine.signal);
    if (mine.signal.aborted) return;
    if (!answer.ok) return fail(answer.detail || `Error ${answer.status}`);
    draw(answer, wanted);
    if (second) drawBeside(second, wanted, answer);
  } catch (reason) {
    if (!mine.signal.aborted) fail(reason === UNREADABLE ? UNREADABLE : "The service cannot be reached.");
  } finally {
    clearTimeout(slow);
    if (running === mine) results.removeAttribute("aria-busy");
  }
}

async function name(wanted, signal) { // the address was opened from elsewhere, so the item has not been seen yet
  const item = await fetch(`${base()}items/${encodeURIComponent(wanted.item)}`, { signal });
  if (!item.ok) return;
  captions.set(base() + wanted.item, (await item.json()).caption || wanted.item);
  if (signal.aborted) return;
  chip(wanted);
  entitle(wanted);
}

function entitle(wanted) { // what is searched for, in the window's title too; "" where it is nothing
  const subject = wanted.q || (wanted.picture || wanted.item ? $("chip-label").textContent : "");
  document.title = subject ? `${subject} · Picture search` : "Picture search";
  return subject;
}

function draw(answer, wanted) {
  error.hidden = nothing.hidden = true;
  empty.hidden = answer !== null;
  drawWords($("words"), answer?.words);
  if (answer === null) {
    results.removeAttribute("aria-busy");
    place([]);
    status.textContent = "";
    return;
  }
  const cards = listed(answer, wanted, collection.value);
  place(cards.cards);
  if (!cards.fitting) tellNothing(wanted, answer.results.length);
  status.textContent = facts(answer, cards.fitting);
}

function listed(answer, wanted, name, to = name) { // a click goes on in the collection `to`
  for (const { id, caption } of answer.results) captions.set(base(name) + id, caption || id);
  return makeCards(answer.results, {
    items: `${base(name)}items`,
    least: leastScore(wanted, name),
    more: ({ id }) => {
      scrollTo({ top: 0 });
      const swapped = to !== collection.value ? { beside: collection.value } : {};
      collection.value = to;
      go({ item: id, ...swapped });
    },
    only: ({ category }) => go({ ...read(), category }),
  });
}

function facts(answer, fitting) {
  const n = answer.results.length;
  const all = [`${n} ${n === 1 ? "result" : "results"}`, `${answer.took_ms.toFixed(1)} ms`];
  if (fitting < n) all[0] += `, ${fitting || "none"} that ${fitting === 1 ? "fits" : "fit"}`;
  if (answer.cached) all.push("cached");
  return [...all, `index version ${answer.index_version}`].join(" · ");
}

// The second collection's answer, with marks on both lists where they are of one gallery.
function drawBeside(answer, wanted, first) {
  other.hidden = $("results-name").hidden = false;
  document.body.classList.add("beside");
  $("results-name").textContent = collection.value;
  $("other-name").textContent = beside.value;
  if (!answer.ok) {
    $("other-status").textContent = answer.detail || (answer.status ? `Error ${answer.status}` : "The service cannot be reached.");
    return;
  }
  const ids = new Set(first.results.map(({ id }) => id));
  const alike = answer.results.some(({ id }) => ids.has(id));
  const { cards, fitting } = listed(answer, wanted, beside.value, alike ? collection.value : beside.value);
  $("others").replaceChildren(...cards);
  markPlaces([...results.children], answer.results, beside.value);
  markPlaces(cards, first.results, collection.value);
  $("other-status").textContent = facts(answer, fitting);
}

function hideBeside() {
  other.hidden = $("results-name").hidden = true;
  document.body.classList.remove("beside");
  $("others").replaceChildren();
}

function offerBeside(wanted) { // every collection but the one that is searched
  const names = collections.map(({ name }) => name).filter((name) => name !== collection.value);
  beside.replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
  beside.value = names.includes(wanted) ? wanted : "";
}

// The calibrated cut-off, which holds for searches by words alone; without one everything counts as fitting.
function leastScore(wanted, name) {
  const words = wanted.q && !wanted.item && !wanted.picture && !wanted.without;
  const found = words ? collections.find((each) => each.name === name)?.min_score : null;
  return found ?? -Infinity;
}

function tellNothing(wanted, shown) {
  const where = wanted.category ? ` in the category “${wanted.category}”` : "";
  nothing.querySelector(".lead").textContent = wanted.q ? `Nothing fits “${wanted.q}”${where}` : `Nothing is there${where}`;
  nothing.querySelector(".why").textContent = shown
    ? "These come nearest, but score less than nearly all queries do with the picture that they mean."
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

function place(cards) { // who was among the results with the keyboard stays there
  const within = $("lists").contains(document.activeElement);
  hideBeside();
  results.replaceChildren(...cards);
  if (within) results.focus({ preventScroll: true });
}

function chip(wanted) {
  $("chip").hidden = !wanted.item && !wanted.picture;
  if (wanted.picture) {
    const { file, url } = pictures.get(wanted.picture);
    $("chip-image").src = url;
    $("chip-label").textContent = $("chip").title = file.name || "pasted picture";
  } else if (wanted.item) {
    $("chip-image").src = `${base()}items/${encodeURIComponent(wanted.item)}/image`;
    $("chip-label").textContent = $("chip").title = `more like ${known(wanted.item) ?? wanted.item}`;
  } else {
    $("chip-image").removeAttribute("src");
  }
  query.placeholder = $("chip").hidden ? "What does the picture show?" : "Or search by words";
}

function searchBy(chosen) {
  if (!chosen) return;
  const name = `${Date.now().toString(36)}${pictures.size}`; // as of no other load of the page
  pictures.set(name, { file: chosen, url: URL.createObjectURL(chosen) });
  go({ ...read(), q: "", item: null, picture: name });
}

const pictureAmong = (files) => [...files].find((each) => each.type.startsWith("image/"));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.value.trim()) go({ q: query.value.trim(), category: read().category });
});
for (const input of [query, without]) {
  input.addEventListener("input", () => {
    clearTimeout(typing);
    const before = read();
    typing = setTimeout(() => {
      if (!ready) return; // `begin` looks at what was typed
      const q = query.value.trim();
      if (q !== before.q) go({ q, category: before.category }, { replace: Boolean(before.q && q) });
      else if (without.value.trim() !== (before.without ?? "")) go(before, { replace: true });
    }, TYPING_MS);
  });
}
count.addEventListener("change", () => go(read(), { replace: true }));
explain.addEventListener("change", () => go(read(), { replace: true }));
beside.addEventListener("change", () => go({ ...read(), beside: beside.value }));
collection.addEventListener("change", () => {
  const { q, picture, in: before, beside: second } = read();
  go({ q, picture, beside: second === collection.value ? before ?? collections[0].name : second });
});
$("category").addEventListener("click", () => {
  results.focus({ preventScroll: true });
  go({ ...read(), category: null });
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
  const chosen = pictureAmong(event.clipboardData.files);
  const words = event.target === query && event.clipboardData.types.includes("text/plain"); // as office programs copy both
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
  searchBy(pictureAmong(files) ?? files[0]);
});

async function suggest() { // what can be asked for: captions of the gallery, or what is known of the bundled ones
  const from = (suggested = base());
  const items = async (options) => {
    const answer = await fetch(`${from}items?${new URLSearchParams(options)}`);
    return answer.ok ? answer.json() : { count: 0, items: [] };
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
    // the first search will tell
  }
  if (from !== base()) return; // another collection was chosen meanwhile
  const button = (textContent) =>
    Object.assign(document.createElement("button"), { type: "button", dir: "auto", textContent, ariaPressed: textContent === read().q });
  $("examples").replaceChildren(...examples.map(button));
  $("examples").hidden = !examples.length;
}

async function begin() {
  for (let wait = 1000; !ready; wait = Math.min(2 * wait, 15000)) {
    const answer = await fetch("collections").catch(() => null);
    if (answer?.ok) {
      collections = (await answer.json()).collections;
      ready = true;
    } else {
      const problem = await answer?.json().catch(() => null);
      fail(problem?.detail || (answer ? `Error ${answer.status}` : "The service cannot be reached."));
      if (answer?.status === 401) return;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  error.hidden = true;
  collection.replaceChildren(...collections.map(({ name }) => new Option(name, name)));
  $("where").hidden = $("versus").hidden = collections.length < 2;
  const { in: where, category } = read(), typed = query.value.trim();
  if (collections.some(({ name }) => name === where)) collection.value = where;
  if (typed) go({ q: typed, category });
  else show();
}

without.value = read().without ?? "";
begin();
