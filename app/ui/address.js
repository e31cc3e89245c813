// The address of the page: the search, the opened item and the scroll position.
//
// - The search is in the fragment (#q=words or #item=id&item=id), so links can be shared and "back" works.
// - An image does not fit into an address; it is kept in memory under a name (#picture=lx3k2a) until the page is closed.
// - The entry of the browser's history remembers how far the list was scrolled.

const TEXTS = ["q", "picture", "crop", "without", "words", "sort", "in", "beside", "show", "of"];
const LISTS = { like: "item", unlike: "less", concepts: "name" };
const SWITCHES = ["explain", "fold"];

// q: words. concepts: names beside them. like, unlike: ids of items. picture: name of an image in memory; crop: the part of it that is searched.
// filter: conditions by field, as in the API. words: "1" or "0" if the words are looked up or not, "" for the page's
// default. in, beside: collections, "" for the default one and for none. show: id of the opened item; of: its collection
// if that is not `in`.
export const EMPTY = Object.freeze({
  q: "", concepts: [], like: [], unlike: [], picture: "", crop: "", filter: {}, without: "", words: "", sort: "", in: "", beside: "",
  show: "", of: "", explain: false, fold: false,
});

export function parseAddress(hash) {
  const params = new URLSearchParams(hash.slice(1));
  const state = { ...EMPTY, filter: parseFilter(params) };
  for (const name of TEXTS) state[name] = params.get(name) ?? "";
  for (const [name, key] of Object.entries(LISTS)) state[name] = params.getAll(key);
  for (const name of SWITCHES) state[name] = params.get(name) === "1";
  return state;
}

function parseFilter(params) {
  const category = params.get("category");
  let filter = null;
  try {
    filter = JSON.parse(params.get("filter"));
  } catch {
    // a damaged link
  }
  return { ...(filter instanceof Object && !Array.isArray(filter) ? filter : {}), ...(category ? { category } : {}) };
}

export function formatAddress(state) {
  const params = new URLSearchParams();
  const { category, ...filter } = state.filter;
  if (typeof category === "string") params.append("category", category);
  else if (category !== undefined) filter.category = category;
  for (const name of TEXTS) if (state[name]) params.append(name, state[name]);
  for (const [name, key] of Object.entries(LISTS)) for (const id of state[name]) params.append(key, id);
  if (Object.keys(filter).length) params.append("filter", JSON.stringify(filter));
  for (const name of SWITCHES) if (state[name]) params.append(name, "1");
  return String(params);
}

// True if the state has something to search for; without it the gallery is shown.
export const hasSubject = (state) => Boolean(queryOf(state) || state.picture || state.like.length);

// Returns names and words as the service reads them.
export const queryOf = ({ concepts, q }) => [...concepts.map((name) => `@${name}`), q].filter(Boolean).join(" ");
// True if one name is searched and nothing else.
export const isOneConcept = (state) => state.concepts.length === 1 && !listKey({ ...state, concepts: [], in: "", words: "", sort: "", fold: false });

export const hasFilter = (state) => Object.keys(state.filter).length > 0;

// Equal for states that show the same list.
export const listKey = (state) => formatAddress({ ...state, show: "", of: "", explain: false });

export function writeAddress(state, { replace = false, position = null } = {}) {
  const params = formatAddress(state);
  try { // browsers limit how often this may be called
    history[replace ? "replaceState" : "pushState"](position, "", params ? `#${params}` : location.pathname + location.search);
  } catch {
    // the address is late; the page is not
  }
}

export function savePosition(position) {
  try {
    history.replaceState(position, "");
  } catch {
    // see above
  }
}
