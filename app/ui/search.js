// The search page: from a state (see address.js) to requests, and from their responses to the list.
//
// - Typing searches at once, with one request in progress; everything else aborts the request before it. Stale
//   responses are dropped.
// - "Back" loads as much of the list as was shown and scrolls there.
// - Requests start once the collections are loaded; text typed before that waits.

import { EMPTY, formatAddress, hasSubject, listKey, parseAddress, savePosition, writeAddress } from "./address.js";
import { handleCardKey, sharpenCards } from "./cards.js";
import { drawConcept, offerNames, prepareConcepts, searchable, teach } from "./concepts.js";
import { drawControls, prepareControls, splitWithout } from "./controls.js";
import { prepareCrop } from "./crop.js";
import { closeDetail, openDetail, prepareDetail } from "./detail.js";
import { drawFacets, prepareFacets } from "./facets.js";
import { canGrow, clearLists, drawCompared, drawFacts, drawList, explainLists, explainNow, growList, itemsOf, prepareList, searchedIn, shownCount } from "./list.js";
import { followScroll } from "./scrolling.js";
import { clearSelection, drawSelection, prepareSelection } from "./selection.js";
import { isInternal, listCollections, loadCatalogue, loadPage, saveKey, savedKey } from "./service.js";
import { prepareSize } from "./size.js";
import { images, prepareUpload } from "./upload.js";

const $ = (id) => document.getElementById(id);
const query = $("query"), results = $("results"), error = $("error"), collection = $("collection"), beside = $("beside");
const SLOW_MS = 500;
const LONGEST_WAIT_MS = 2000; // until a service that does not answer yet is asked again
const SAME_ENTRY_MS = 2000; // typing within this time replaces the entry of the history
const WIDE = matchMedia("(min-width: 900px)"); // room for a column of filters

let collections = []; // as GET /collections lists them, the default one first
let state = parseAddress(location.hash);
let drawn = null; // key of the state in the list
let running = null; // AbortController of the requests in progress
let isTyping = false; // the requests in progress were started by typing
let hasTypedMore = false; // and more was typed since
let typedAt = -Infinity;

const isReady = () => collections.length > 0;
const nameOf = (name) => name || collections[0]?.name;
const isSearched = (name) => nameOf(name) === nameOf(state.in);
const about = (name) => collections.find((each) => each.name === nameOf(name));
const base = (name = state.in) => (name && name !== nameOf("") ? `collections/${encodeURIComponent(name)}/` : "");
const position = () => ({ top: Math.round(scrollY), shown: shownCount() });
const href = (id, name) => `#${formatAddress({ ...EMPTY, in: name === nameOf("") ? "" : name, show: id })}`;

// Changes the state and shows it.
function go(change, { replace = false, typed = false, isNew = false } = {}) {
  if (!state.show && isReady()) savePosition(position());
  const wasOpen = Boolean(state.show);
  state = { ...state, ...change, ...("show" in change ? {} : { show: "", of: "" }) };
  if (state.in === nameOf("")) state.in = "";
  const isOpened = state.show && (wasOpen ? replace && history.state?.index : true);
  writeAddress(state, { replace, position: isOpened ? { opened: true } : null });
  if (typed && running && isTyping) hasTypedMore = true;
  else show({ typed, isNew });
}

async function show({ typed = false, restored = null, isNew = false } = {}) {
  if (!isReady()) return;
  if (state.beside && isSearched(state.beside)) state.beside = "";
  if (state.picture && !images.has(state.picture)) { // it is lost when the page is closed or loaded again
    state = { ...state, picture: "", crop: "", unlike: state.q || state.like.length ? state.unlike : [] };
    writeAddress(state, { replace: true, position: history.state });
  }
  drawControls();
  drawFacets(base(), state);
  drawConcept();
  drawSelection(hasSubject(state), nameOf(state.in));
  for (const name of [state.in, state.beside, state.of]) {
    if (name && !about(name)) return fail(`There is no gallery “${name}”.`);
  }
  if (isNew || listKey(state) !== drawn) await load({ typed, restored });
  else {
    if (running) { // another search, that the user has left again
      stop();
      drawFacts();
      if (restored?.shown) scrollTo({ top: restored.top, behavior: "instant" });
    }
    explainLists(state.explain);
  }
  drawDetail();
}

function stop() {
  running?.abort();
  running = null;
  results.removeAttribute("aria-busy");
}

async function load({ typed, restored }) {
  stop();
  const mine = (running = new AbortController()), wanted = state, { signal } = mine;
  isTyping = typed;
  hasTypedMore = false;
  results.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => {
    if (signal.aborted) return;
    $("status").textContent = "Searching…";
    error.hidden = true; // it belongs to the previous search
  }, SLOW_MS);
  try {
    const first = loadPage(wanted, base(wanted.in), 0, signal);
    const second = wanted.beside && hasSubject(wanted) ? loadPage(wanted, base(wanted.beside), 0, signal).catch((reason) => reason) : null;
    const [found, other, { group_field: groups }] = await Promise.all([first, second, loadCatalogue(base(wanted.in))]);
    if (signal.aborted) return;
    drawn = listKey(wanted);
    error.hidden = $("key-form").hidden = true;
    drawList(found, wanted, groups);
    if (other) drawCompared(other, wanted);
    explainLists(state.explain);
    await restore(restored, signal);
  } catch (reason) {
    if (hasTypedMore && !signal.aborted) drawFacts(); // the words that failed are no longer the typed ones
    else if (!signal.aborted) fail(reason.message, reason.status);
  } finally {
    clearTimeout(slow);
    if (running === mine) {
      stop();
      if (hasTypedMore) show({ typed: true });
    }
  }
}

async function restore(restored, signal) {
  if (!restored?.shown) return;
  while (shownCount() < restored.shown && (await growList()) && !signal.aborted);
  if (!signal.aborted) scrollTo({ top: restored.top, behavior: "instant" });
}

function fail(message, code) {
  stop();
  drawn = null;
  error.textContent = message;
  error.hidden = code === 401;
  $("key-form").hidden = code !== 401;
  clearLists();
  closeDetail();
}

function removePart(part, name) {
  const left = { ...state, ...(part === "picture" ? { picture: "", crop: "" } : { [part]: state[part].filter((each) => name && each !== name) }) };
  query.focus();
  go(hasSubject(left) ? left : { ...left, unlike: [] });
}

async function drawDetail() {
  if (!state.show) return closeDetail();
  const about = await loadCatalogue(base(state.of || state.in)).catch(() => ({ fields: [] }));
  if (!state.show) return;
  const items = itemsOf(state.of), at = items.findIndex(({ id }) => id === state.show);
  openDetail({
    id: state.show, base: base(state.of || state.in), result: items[at], groups: about.group_field, hides: (name) => isInternal(name, about),
    explain: hasSubject(state) && items[at] ? () => explainNow(items[at], state, base(state.of || state.in)) : null,
    isExplained: state.explain,
    canLess: hasSubject(state) && isSearched(searchedIn(state.of || state.in)),
    hasPrevious: at > 0, hasNext: at >= 0 && (at + 1 < items.length || (!state.of && canGrow())),
  });
}

async function step(direction) { // to the neighbour of the opened item
  const items = itemsOf(state.of), at = items.findIndex(({ id }) => id === state.show);
  if (at < 0) return;
  if (at + direction === items.length && !state.of) await growList();
  const next = items[at + direction];
  if (next) go({ show: next.id, of: state.of }, { replace: true });
}

function closeItem() {
  const id = state.show;
  if (history.state?.index) history.back();
  else go({ show: "", of: "" }, { replace: true });
  const card = [...document.querySelectorAll(".card")].find((node) => node.dataset.id === id);
  setTimeout(() => { // after the dialog has given the focus back
    if (document.activeElement !== query) card?.querySelector(".open").focus();
  }, 50);
}

// Searches for images like some of a collection, which becomes the searched one.
function searchLike(ids, name) {
  const swapped = { in: name, beside: nameOf(state.in), filter: {} };
  go({ q: "", concepts: [], picture: "", crop: "", unlike: [], like: ids, sort: "", ...(isSearched(name) ? {} : swapped) });
  scrollTo({ top: 0 }); // after the position was saved
}

function toggleFilter(field, value) { // undefined removes the filter
  const { [field]: _, ...others } = state.filter;
  go({ filter: value === undefined ? others : { ...others, [field]: value } });
}

const searchConcept = (concept, name) => go({ ...EMPTY, in: name, concepts: [concept] }, { isNew: true });
const searchUnlike = (ids) => go({ unlike: [...new Set([...state.unlike, ...ids])] });

function typed() {
  if (!isReady()) return; // `begin` reads the typed text
  const change = { q: searchable(query.value), without: searchable($("without").value) };
  if (change.q === state.q && change.without === state.without) return;
  const now = performance.now(), isSame = now - typedAt < SAME_ENTRY_MS && hasSubject(state) && Boolean(change.q);
  typedAt = now;
  go(change, { replace: isSame || change.q === state.q, typed: true });
}

prepareControls({
  base, nameOf, isSearched,
  state: () => state,
  names: () => collections.map(({ name }) => name),
  remove: removePart,
  open: (concept) => searchConcept(concept, state.in),
});
prepareList({
  base, nameOf, href,
  total: (name) => about(name)?.count ?? 0,
  isBusy: () => running !== null,
  open: (id, name) => go({ show: id, of: isSearched(name) ? "" : name }),
  only: (category) => toggleFilter("category", category),
});
prepareDetail({
  step,
  close: closeItem,
  open: (id) => go({ show: id, of: state.of }, { replace: true }),
  link: (id) => new URL(href(id, state.of || state.in), location.href).href,
  similar: (id) => searchLike([id], searchedIn(state.of || state.in)),
  less: (id) => searchUnlike([id]),
  only: (category) => toggleFilter("category", category),
});
prepareSelection({ more: searchLike, less: searchUnlike, teach: (ids, name) => teach(ids, base(name), (concept) => { clearSelection(); searchConcept(concept, name); }) });
prepareConcepts({ base, go, typed, state: () => state });
prepareUpload((picture) => go({ picture, crop: "", like: [], sort: "" }));
prepareCrop((crop, byKey = false) => go({ crop }, { replace: byKey, typed: byKey }));
prepareFacets(WIDE, toggleFilter);
prepareSize(sharpenCards);
WIDE.addEventListener("change", () => drawFacets(base(), state));

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  typed();
  if (matchMedia("(pointer: coarse)").matches) query.blur(); // closes the keyboard
});
for (const input of [query, $("without")]) input.addEventListener("input", typed);
query.addEventListener("input", offerNames);
$("sort").addEventListener("change", () => go({ sort: $("sort").value }, { replace: true }));
$("clear-filters").addEventListener("click", () => go({ filter: {} }));
$("words").addEventListener("change", async () => {
  const isOn = $("words").checked, { hybrid_by_default } = await loadCatalogue(base());
  go({ words: isOn === hybrid_by_default ? "" : isOn ? "1" : "0" }, { replace: true });
});
$("fold").addEventListener("change", () => go({ fold: $("fold").checked }, { replace: true }));
$("explain").addEventListener("change", () => go({ explain: $("explain").checked }, { replace: true }));
beside.addEventListener("change", () => go({ beside: beside.value }));
collection.addEventListener("change", () => {
  clearSelection();
  const swapped = state.beside === collection.value ? nameOf(state.in) : state.beside;
  go({ in: collection.value, beside: swapped, concepts: [], like: [], unlike: [], filter: {}, sort: "" });
});
$("offer").addEventListener("click", ({ target }) => {
  if (target.type !== "button") return;
  go(splitWithout(state));
  $("form").classList.add("open"); // on a phone the box is hidden otherwise
});
$("examples").addEventListener("click", ({ target }) => {
  const chosen = target.closest("button");
  if (chosen) go({ q: chosen.value });
});
$("more-options").addEventListener("click", () => {
  $("more-options").setAttribute("aria-expanded", $("form").classList.toggle("open"));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey($("key").value.trim());
  $("key").value = "";
  begin();
});
$("forget-key").addEventListener("click", () => {
  saveKey("");
  location.reload();
});
addEventListener("popstate", (event) => {
  state = parseAddress(location.hash);
  show({ restored: event.state });
});
addEventListener("keydown", (event) => {
  if (handleCardKey(event) || event.ctrlKey || event.metaKey || event.altKey || $("detail").open) return;
  const isFree = event.target === query ? !query.value : !event.target.matches?.("input, textarea, select");
  if (event.key === "/" && isFree) {
    event.preventDefault();
    query.focus();
    query.select();
  }
});

followScroll(() => !state.show && drawn !== null && !running && savePosition(position()));

async function begin() {
  for (let wait = 500; !isReady(); wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    try {
      collections = await listCollections();
      if (about(state.in)?.index_version === null) await loadCatalogue(base()); // says why it is not served yet
    } catch ({ message, status }) {
      collections = [];
      fail(status === 401 ? "The service does not know this key, or it opens no gallery." : message, status);
      if (status === 401) {
        error.hidden = !savedKey();
        saveKey("");
        return $("key").focus();
      }
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  error.hidden = $("key-form").hidden = true;
  collection.replaceChildren(...collections.map(({ name }) => new Option(name, name)));
  $("where").hidden = $("versus").hidden = collections.length < 2;
  const words = query.value.trim();
  if (words && words !== state.q) {
    state.q = words;
    writeAddress(state, { replace: true });
  }
  show({ restored: history.state });
}

begin();
