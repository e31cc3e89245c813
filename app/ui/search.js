// The search page. The address holds the query (#q=words&k=24 or #item=id&k=24), so it can be shared and "back" works;
// a picture cannot be put into an address and is kept in memory by number (#picture=1) as long as the page lives.
// Every request aborts the one before; an answer that is no longer wanted is never shown.

const $ = (id) => document.getElementById(id);
const form = $("form"), query = $("query"), file = $("file"), count = $("k");
const results = $("results"), status = $("status"), error = $("error"), empty = $("empty");
const TYPING_MS = 180;

const pictures = new Map(); // number -> {file, url}
const captions = new Map(); // id -> caption of the items seen so far
let typing = 0;
let running = null;

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const wanted = { q: given.get("q") ?? "", item: given.get("item"), picture: given.get("picture"), k: given.get("k") };
  if (wanted.picture !== null && !pictures.has(wanted.picture)) wanted.picture = null; // the page was reloaded
  return wanted;
}

function go(wanted, { replace = false } = {}) {
  const parts = new URLSearchParams();
  for (const name of ["q", "item", "picture"]) if (wanted[name]) parts.set(name, wanted[name]);
  if ([...parts].length) parts.set("k", count.value);
  const address = [...parts].length ? `#${parts}` : location.pathname + location.search;
  if (`#${parts}` !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", address);
  show();
}

function ask(wanted, signal) {
  const k = Number(count.value);
  if (wanted.picture) {
    const body = new FormData();
    body.append("file", pictures.get(wanted.picture).file);
    body.append("k", k);
    return fetch("search/image", { method: "POST", body, signal });
  }
  if (wanted.item) return fetch(`items/${encodeURIComponent(wanted.item)}/similar?k=${k}`, { signal });
  const headers = { "Content-Type": "application/json" };
  return fetch("search/text", { method: "POST", headers, body: JSON.stringify({ query: wanted.q, k }), signal });
}

async function show() {
  clearTimeout(typing);
  running?.abort();
  const wanted = read();
  if (wanted.k && [...count.options].some((option) => option.value === wanted.k)) count.value = wanted.k;
  if (document.activeElement !== query || query.value.trim() !== wanted.q) query.value = wanted.q;
  chip(wanted);
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button.textContent === wanted.q);
  document.title = wanted.q ? `${wanted.q} · Picture search` : "Picture search";
  if (!wanted.q && !wanted.item && !wanted.picture) return draw(null);

  const mine = (running = new AbortController());
  results.setAttribute("aria-busy", "true");
  try {
    const answer = await ask(wanted, mine.signal);
    if (wanted.item && !captions.has(wanted.item)) await name(wanted, mine.signal);
    const body = await answer.json().catch(() => ({}));
    if (mine.signal.aborted) return;
    if (answer.ok) draw(body);
    else fail(body.errors?.map((fault) => `${fault.field}: ${fault.message}`).join("; ") || body.detail || `Error ${answer.status}`);
  } catch (reason) {
    if (!mine.signal.aborted) fail("The service cannot be reached.");
  } finally {
    if (running === mine) results.removeAttribute("aria-busy");
  }
}

async function name(wanted, signal) { // the address was opened from elsewhere, so the item has not been seen yet
  const item = await fetch(`items/${encodeURIComponent(wanted.item)}`, { signal });
  if (!item.ok) return;
  captions.set(wanted.item, (await item.json()).caption || wanted.item);
  if (!signal.aborted) chip(wanted);
}

function draw(answer) {
  error.hidden = true;
  empty.hidden = answer !== null;
  if (answer === null) {
    results.removeAttribute("aria-busy");
    results.replaceChildren();
    status.textContent = "";
    return;
  }
  const scores = answer.results.map((result) => result.score);
  const top = Math.max(...scores), span = Math.max(top - Math.min(...scores), 1e-6);
  const share = (score) => 1 - (0.9 * (top - score)) / span; // 1 for the best, 0.1 for the last one shown
  results.replaceChildren(...answer.results.map((result) => card(result, share(result.score))));
  const n = answer.results.length;
  const facts = [`${n} ${n === 1 ? "result" : "results"}`, `${answer.took_ms.toFixed(1)} ms`];
  if (answer.cached) facts.push("cached");
  status.textContent = [...facts, `index version ${answer.index_version}`].join(" · ");
}

function fail(message) {
  error.textContent = message;
  error.hidden = false;
  empty.hidden = true;
  status.textContent = "";
  results.replaceChildren();
}

function card(result, share) {
  const node = $("card").content.cloneNode(true);
  const find = (name) => node.querySelector(name);
  captions.set(result.id, result.caption || result.id);
  find("img").src = result.image_url;
  find(".caption").textContent = result.caption || result.id;
  find(".category").textContent = result.category;
  find(".number").textContent = result.score.toFixed(3);
  find(".fill").style.setProperty("--share", share);
  find(".score").title = `cosine ${result.score.toFixed(4)}; the bar compares the results shown`;
  const button = find("button");
  button.title = `${result.caption || result.id}\nFind more like this`;
  button.addEventListener("click", () => {
    scrollTo({ top: 0 });
    go({ item: result.id });
  });
  return node;
}

function chip(wanted) {
  $("chip").hidden = !wanted.item && !wanted.picture;
  if (wanted.picture) {
    const { file, url } = pictures.get(wanted.picture);
    $("chip-image").src = url;
    $("chip-label").textContent = file.name || "pasted picture";
  } else if (wanted.item) {
    $("chip-image").src = `items/${encodeURIComponent(wanted.item)}/image`;
    const label = `more like ${captions.get(wanted.item) ?? wanted.item}`;
    $("chip-label").textContent = label;
    $("chip").title = label;
  } else {
    $("chip-image").removeAttribute("src");
  }
  query.placeholder = $("chip").hidden ? "What does the picture show?" : "Or search by words";
}

function searchBy(chosen) {
  if (!chosen) return;
  const number = String(pictures.size + 1);
  pictures.set(number, { file: chosen, url: URL.createObjectURL(chosen) });
  go({ picture: number });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.value.trim()) go({ q: query.value.trim() });
});
query.addEventListener("input", () => {
  clearTimeout(typing);
  const before = read();
  typing = setTimeout(() => {
    const q = query.value.trim();
    if (q !== before.q) go({ q }, { replace: Boolean(before.q && q) });
  }, TYPING_MS);
});
count.addEventListener("change", () => go(read(), { replace: true }));
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
  const chosen = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (chosen) {
    event.preventDefault();
    searchBy(chosen);
  }
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !(event.target instanceof HTMLInputElement) && !event.ctrlKey && !event.metaKey) {
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
  searchBy(event.dataTransfer.files[0]);
});

show();
