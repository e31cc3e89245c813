// The search form, drawn from the state: galleries, words, options, order, and the parts that are no words.

import { hasFilter, hasSubject, queryOf } from "./address.js";
import { drawChips } from "./chips.js";
import { searchable } from "./concepts.js";
import { drawPicture } from "./crop.js";
import { canSort, loadCatalogue, savedKey } from "./service.js";
import { aboutCollection, drawAbout } from "./start.js";

const $ = (id) => document.getElementById(id);
const query = $("query"), collection = $("collection"), beside = $("beside");
let page, about = {}; // what `loadCatalogue` returns of the searched collection

// state: returns the present state. names: returns those of the collections. nameOf, isSearched, base: see search.js.
// remove: called with the part of the state whose chip was removed. open: called with the name whose chip was clicked.
export function prepareControls(given) {
  page = given;
}

const WITHOUT = /^(\S.*?)\s+(?:without|with no|no)\s+(?:(?:an?|any|the)\s+)?(\S.*)$/i;

// Returns the words of "cat without tears" as a search for "cat" without "tears", or null.
export function splitWithout({ q, without }) {
  const found = without ? null : WITHOUT.exec(q);
  return found && { q: found[1], without: found[2] };
}

function drawOffer(state) {
  const found = splitWithout(state);
  $("offer").hidden = !found;
  if (found) $("offer").querySelector("button").textContent = `Search for “${found.q}” and take “${found.without}” away`;
}

export function drawControls() {
  const state = page.state(), others = page.names().filter((name) => !page.isSearched(name));
  beside.replaceChildren(new Option("nothing", ""), ...others.map((name) => new Option(name, name)));
  beside.value = state.beside;
  setText(query, state.q);
  setText($("without"), state.without);
  drawOffer(state);
  $("explain").checked = state.explain;
  $("fold").checked = state.fold;
  $("start").hidden = hasSubject(state) || hasFilter(state);
  const isOther = collection.dataset.about !== page.nameOf(state.in);
  collection.value = collection.dataset.about = page.nameOf(state.in);
  if (isOther) drawStart();
  drawSwitches();
  drawSort();
  drawPicture(state);
  drawParts();
  for (const node of $("examples").querySelectorAll("button")) node.setAttribute("aria-pressed", node.value === state.q);
  $("forget-key").hidden = !savedKey();
}

async function drawStart() {
  const name = page.state().in, described = await aboutCollection(page.base()).catch(() => null);
  if (!described || !page.isSearched(name)) return;
  drawAbout(described, page.base());
  drawSort();
}

async function drawSwitches() {
  const name = page.state().in;
  const loaded = await loadCatalogue(page.base()).catch(() => ({}));
  if (!page.isSearched(name)) return;
  about = loaded;
  const { has_words, hybrid_by_default, group_field, model_note, languages } = about;
  const { words, q } = page.state();
  const isUnread = languages === "English" && /\p{L}/u.test(q) && !/\p{Script=Latin}/u.test(q);
  $("model-note").textContent = isUnread ? "This model knows English. Search in English, or index with a multilingual model." : model_note;
  $("model-note").hidden = !isUnread && !model_note;
  $("words-label").hidden = !has_words;
  $("words").checked = words ? words === "1" : hybrid_by_default;
  $("fold-label").hidden = Boolean(group_field);
  document.body.classList.toggle("may-write", Boolean(about.may_write));
  drawSort();
}

function drawSort() {
  const sort = $("sort"), state = page.state();
  if (sort.options.length) sort.options[0].textContent = hasSubject(state) ? "best match" : "gallery order";
  sort.value = state.sort;
  $("sort-label").hidden = sort.options.length < 2 || !canSort(state, about);
}

// Sets an input's text; while the user types in it, surrounding spaces stay.
function setText(input, words) {
  if (document.activeElement !== input || searchable(input.value) !== words) input.value = words;
}

function drawParts() {
  const state = page.state();
  const labels = drawChips($("chips"), state, page.base(), { remove: page.remove, open: page.open, changed: drawParts });
  query.placeholder = labels.length ? "Add words" : "Describe an image";
  const subject = queryOf(state) || labels[0];
  document.title = subject ? `${subject} · Image search` : "Image search";
}
