// Requests to the service, with the API key of this tab if it has one.

import { hasFilter, hasSubject, queryOf } from "./address.js";
import { parseCrop } from "./crop.js";
import { images, shrink } from "./upload.js";

const KEY = "dcar.key";
const FOLD = 0.95; // cosine from which on two images are nearly the same
const PAGE = 24;
const COMPARED = 12; // of each list, side by side
const BROWSED = 48;
const PRETTY = [ // of the bundled emoji, which begin with keycaps
  "animal-bird", "animal-mammal", "animal-marine", "event", "food-fruit", "food-prepared", "food-sweet", "musical-instrument",
  "plant-flower", "plant-other",
];
const RETRY_MS = [1500, 4000, 10000]; // delays before an image that failed to load is requested again

const shown = new WeakMap(); // image element -> AbortController of what is shown in it

export const savedKey = () => sessionStorage.getItem(KEY) ?? "";

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// An error with a text for people, and the HTTP status: 0 if the service cannot be reached.
export class ServiceError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function request(path, options = {}) {
  const key = savedKey();
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...options.headers };
  return fetch(path, { ...options, headers });
}

async function requestJson(path, options) {
  let response;
  try {
    response = await request(path, options);
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    throw new ServiceError("The service cannot be reached.", 0);
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new ServiceError(body.detail?.replace(/^file: /, "") || `Error ${response.status}`, response.status);
  return body;
}

export async function listCollections() { // 401 also if the key's scope names none of them
  const { collections } = await requestJson("collections");
  if (!collections.length) throw new ServiceError("This key opens no gallery.", 401);
  return collections;
}

// base: path of a collection, "" for the default one. Returns {count, items, next_offset}.
export async function browse(base, { k = BROWSED, filter = {}, ...options }, signal) {
  const given = { k: await atMost(base, k), ...options, filter: hasFilter({ filter }) ? JSON.stringify(filter) : "" };
  const present = Object.entries(given).filter(([, value]) => value !== "" && value !== undefined);
  return requestJson(`${base}items?${new URLSearchParams(present)}`, { signal });
}

const catalogues = new Map(); // path of a collection -> promise of its catalogue

// Returns {fields, group_field, has_words, has_cutoff, hybrid_by_default, model_note, languages, max_k, may_write}: see `app/api/page.py`.
export function loadCatalogue(base) {
  if (!catalogues.has(base)) {
    const loading = requestJson(`${base}ui/catalogue`);
    loading.catch(() => catalogues.delete(base));
    catalogues.set(base, loading);
  }
  return catalogues.get(base);
}

// Returns the figures of the insights page: see `app/api/feedback.py`.
export const loadInsights = (base, adminKey) => requestJson(`${base}ui/insights/data`, { headers: { Authorization: `Bearer ${adminKey}` } });

// Returns a number of items, or the largest that the service allows in a request.
const atMost = async (base, k) => Math.min(k, (await loadCatalogue(base)).max_k);

async function loadAllFacets(base, filter) {
  const params = hasFilter({ filter }) ? `?${new URLSearchParams({ filter: JSON.stringify(filter) })}` : "";
  const [{ facets }, about] = await Promise.all([requestJson(`${base}ui/facets${params}`), loadCatalogue(base)]);
  return facets.filter(({ name }) => !isInternal(name, about));
}

// True for a field of the bundled emoji that says how they were used for training.
export const isInternal = (name, about) => isEmoji(about) && ["split", "base", "file_name"].includes(name);

export const isEmoji = ({ fields }) => ["char", "meta_category"].every((known) => fields.some(({ name }) => name === known));

const galleries = new Map(); // path of a collection -> promise of the facets of the whole gallery

// Returns [{name, values: [{value, count}], range}]: counts among the images that fit a search by its cut-off or its
// words, else among all; the least and the greatest value of a number that has no single values. A field is counted
// without its own filter, so that another value can be chosen.
export async function loadFacets(base, state) {
  if (!galleries.has(base)) galleries.set(base, loadAllFacets(base, {}).catch((reason) => galleries.delete(base) && Promise.reject(reason)));
  const whole = await galleries.get(base), about = await loadCatalogue(base);
  const ranges = new Map(whole.flatMap(({ name, values }) => {
    const [first, last] = [values[0]?.value?.gte, values.at(-1)?.value?.lte];
    return typeof first === "number" ? [[name, [first, last]]] : [];
  }));
  const found = whole.length && hasSubject(state) && canCount(state, about) ? await countFound(base, state, about, whole.map(({ name }) => name)) : null;
  const facets = found ?? (hasFilter(state) ? await loadAllFacets(base, state.filter) : whole);
  const isActive = ({ name, values }) => values.length || state.filter[name] !== undefined;
  return facets.map((facet) => ({ ...facet, range: ranges.get(facet.name) })).filter(isActive);
}

// True if the service can tell which images fit a search.
const canCount = (state, about) => about.fields.length > 0 && Boolean(state.q) && !state.picture && (isHybrid(state, about) || isJudged(state, about));

// Returns null if nothing fits. Only a search that is sorted counts what fits it; a filter of a field needs a search of its own.
async function countFound(base, state, about, names) {
  const { filter } = state, fields = names.filter((name) => filter[name] !== undefined);
  const one = async (facets, left) => {
    const options = await searchOptions({ ...state, filter: left, fold: false }, base);
    return { ...options, k: 1, facets, fields: [], query: queryOf(state), sort: options.sort ?? about.fields[0].name };
  };
  const others = one(names.filter((name) => !fields.includes(name)), filter);
  const own = fields.map((name) => one([name], Object.fromEntries(Object.entries(filter).filter(([each]) => each !== name))));
  const { answers } = await postJson(`${base}search/batch`, { queries: await Promise.all([others, ...own]) });
  const counted = Object.assign({}, ...answers.map(({ count, facets }) => (count ? facets : {})));
  return Object.keys(counted).length ? names.map((name) => ({ name, values: counted[name] ?? [] })) : null;
}

// Returns the items that share a value of a field.
export async function loadGroup(base, field, value) {
  const params = new URLSearchParams({ k: await atMost(base, BROWSED), group_by: "", filter: JSON.stringify({ [field]: value }) });
  return (await requestJson(`${base}items?${params}`)).items;
}

// True if a state's words are looked up as well.
function isHybrid(state, { has_words, hybrid_by_default }) {
  return Boolean(state.q) && has_words && (state.words ? state.words === "1" : hybrid_by_default);
}

// True if the cut-off tells which results fit: for words alone.
function isJudged(state, { has_cutoff }) {
  return has_cutoff && !(state.picture || state.without || state.concepts.length || state.like.length || state.unlike.length);
}

// True if the service can put a list in order: the whole gallery, or what fits a search by its cut-off or its words.
export function canSort(state, about) {
  return !hasSubject(state) || (Boolean(state.q) && (about.has_words || isJudged(state, about)));
}

export const loadItem = (base, id, signal) => requestJson(`${base}items/${encodeURIComponent(id)}`, { signal });

// One page of the list that a state describes, as {results, next_offset, count, ...}.
export async function loadPage(state, base, offset, signal) {
  if (hasSubject(state)) return search(state, base, offset, signal);
  const isSelection = !hasFilter(state) && !state.sort && isEmoji(await loadCatalogue(base));
  const filter = isSelection ? { meta_category: PRETTY } : state.filter;
  const page = await browse(base, { offset, filter, sort: state.sort }, signal);
  return { ...page, results: page.items, isSelection };
}

// The options of a search, apart from its words and its image.
async function searchOptions(state, base) {
  const options = { k: await atMost(base, state.beside ? COMPARED : PAGE), fields: ["*"] };
  const about = await loadCatalogue(base);
  if (hasFilter(state)) options.filter = state.filter;
  if (state.sort && canSort(state, about)) options.sort = state.sort;
  if (isHybrid(state, about) || (options.sort && !isJudged(state, about))) options.hybrid = true;
  if (state.picture && state.crop) options.crop = parseCrop(state.crop);
  if (state.without) options.without = state.without;
  if (state.like.length) options.more_like = state.like;
  if (state.unlike.length) options.less_like = state.unlike;
  if (state.fold && !about.group_field) options.fold = FOLD;
  return options;
}

async function search(state, base, offset, signal) {
  return send(state, base, { ...(await searchOptions(state, base)), offset }, signal);
}

// Returns {relevance, fit, words} of one result of a search: see `drawMap` and `drawWords`.
export async function loadExplanation(state, base, id, signal) {
  const { hybrid, sort, fold, ...options } = await searchOptions(state, base);
  const found = await send(state, base, { ...options, k: 1, filter: { id }, group_by: "", explain: true }, signal);
  return found.results[0]?.explanation;
}

function send(state, base, options, signal) {
  if (state.picture) return searchByImage(state, options, base, signal);
  return postJson(`${base}search/text`, { ...options, query: queryOf(state) || undefined }, signal);
}

function postJson(path, body, signal, method = "POST") {
  const headers = { "Content-Type": "application/json" };
  return requestJson(path, { method, headers, body: JSON.stringify(body), signal });
}

const conceptPath = (base, name) => `${base}concepts/${encodeURIComponent(name)}`;
export const listConcepts = async (base) => (await requestJson(`${base}concepts`)).concepts.map(({ name }) => name);

// Returns {name, kind, ids, not_ids, examples, members, cutoff}.
export const loadConcept = (base, name) => requestJson(conceptPath(base, name));

// Teaches a name by {ids, not_ids, kind}, and returns its concept. Without these it is forgotten.
export function changeConcept(base, name, { ids, not_ids, kind } = {}) {
  galleries.delete(base); // its counts
  if (!ids) return requestJson(conceptPath(base, name), { method: "DELETE" });
  return postJson(conceptPath(base, name), { ids, not_ids, kind: kind || undefined }, undefined, "PUT");
}

// Returns up to six items that nobody has answered for, nearest to the cut-off first.
export async function loadDoubts(base, { name, ids, not_ids, members, cutoff }) {
  const answered = new Set([...ids, ...not_ids]), k = await atMost(base, PAGE), offset = Math.max(0, members - (k >> 1));
  const { results } = await postJson(`${base}search/text`, { query: `@${name}`, k, offset, group_by: "", fields: ["*"] });
  const distance = ({ score }) => Math.abs(score - cutoff);
  return results.filter(({ id }) => !answered.has(id)).sort((a, b) => distance(a) - distance(b)).slice(0, 6);
}

async function searchByImage(state, options, base, signal) {
  const body = new FormData(), { file } = images.get(state.picture);
  await file.slice(0, 1).arrayBuffer().catch(() => { throw new ServiceError("This file cannot be read.", 422); }); // a folder, or deleted
  body.append("file", await shrink(file, options.crop), file.name);
  if (queryOf(state)) body.append("query", queryOf(state));
  for (const [name, value] of Object.entries(options)) body.append(name, name === "without" || name === "sort" ? value : JSON.stringify(value));
  return requestJson(`${base}search/image`, { method: "POST", body, signal });
}

export const imagePath = (base, id) => `${base}items/${encodeURIComponent(id)}/image`;

// Shows an item's thumbnail in an image element, in place of the one before. sides: pixels for screens of one and of two
// dots per pixel. Retries, because rate limits count images too; calls `failed` after the last try.
export function showThumbnail(image, base, id, [once, twice], failed = () => {}) {
  release(image);
  const mine = new AbortController(), { signal } = mine, path = imagePath(base, id);
  shown.set(image, mine);
  const url = (side) => `${path}?size=${side}`;
  let tries = 0;
  const load = () => {
    if (signal.aborted) return;
    if (savedKey()) showPrivate(image, url(devicePixelRatio > 1 ? twice : once), signal);
    else {
      image.srcset = `${url(once)} 1x, ${url(twice)} 2x`;
      image.src = url(once);
    }
  };
  image.onerror = () => {
    if (!image.isConnected && tries) return;
    for (const name of ["src", "srcset"]) image.removeAttribute(name); // no sign of a broken image meanwhile
    if (tries === RETRY_MS.length) failed();
    else setTimeout(load, RETRY_MS[tries++] * (0.5 + Math.random()));
  };
  load();
}

async function showPrivate(image, url, signal) { // an image element cannot send a key
  try {
    const response = await request(url, { headers: { Accept: "image/webp,*/*" }, signal });
    if (!response.ok) throw new ServiceError("", response.status);
    const blob = await response.blob();
    signal.throwIfAborted();
    const source = URL.createObjectURL(blob);
    signal.addEventListener("abort", () => URL.revokeObjectURL(source));
    image.src = source;
  } catch {
    if (!signal.aborted) image.onerror?.();
  }
}

function release(image) {
  shown.get(image)?.abort();
  image.onerror = null;
}

// Empties a list of images, and frees their memory.
export function clearImages(list) {
  for (const image of list.querySelectorAll("img")) release(image);
  list.replaceChildren();
}

// Saves the original image file under a name.
export async function download(base, id, name) {
  const response = await request(imagePath(base, id));
  if (!response.ok) throw new ServiceError("The image is no longer in the gallery.", response.status);
  const url = URL.createObjectURL(await response.blob());
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
