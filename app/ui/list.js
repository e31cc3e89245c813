// The list of images, which grows while it is scrolled, and the second list beside it.

import { EMPTY, hasFilter, hasSubject, queryOf } from "./address.js";
import { explainCard, makeCard, makeDivider, scaleOf } from "./cards.js";
import { rememberCaption } from "./chips.js";
import { markPlaces } from "./compare.js";
import { drawLegend } from "./explain.js";
import { nameResults } from "./feedback.js";
import { fieldName, number, percent } from "./format.js";
import { isSelected, toggleSelected } from "./selection.js";
import { clearImages, loadExplanation, loadPage } from "./service.js";

const EXPLAINED = 8; // cards
const LONGEST = 1.35; // of a frame's sides to each other

const $ = (id) => document.getElementById(id);
const results = $("results"), nothing = $("nothing");

// base, nameOf: path and name of a collection. total: number of items of a state's collection.
// href, open, only: address of an item's detail view, and what a click does.
let page = null;
let list = emptyList();
let urgent = null; // promise of an explanation

const observer = new IntersectionObserver((entries) => entries.at(-1).isIntersecting && !page.isBusy() && growList(), { rootMargin: "600px" });

function emptyList() {
  return { wanted: EMPTY, results: [], others: [], next: undefined, scale: scaleOf({ results: [] }), frame: 1, hasLevels: false, count: 0, facts: "", groups: "", fitting: 0, isSorted: false, isDivided: false, isGrowing: false, isExplained: false, left: new AbortController() };
}

export function prepareList(given) {
  page = given;
}

export const shownCount = () => list.results.length;
export const canGrow = () => list.next !== undefined;
export const itemsOf = (isOther) => (isOther ? list.others : list.results);

// Returns the collection in which the items of a list are searched. Lists that share items show one gallery by two models.
export function searchedIn(name) {
  const known = new Set(list.results.map(({ id }) => id));
  return page.nameOf(list.others.some(({ id }) => known.has(id)) ? list.wanted.in : name);
}

export function clearLists() {
  clearImages(results);
  clearImages($("others"));
  observer.unobserve($("more"));
  nothing.hidden = $("other").hidden = $("results-name").hidden = $("scores").hidden = true;
  document.body.classList.remove("beside");
  drawLegend($("legend"), false);
  $("status").textContent = "";
  list.left.abort();
  list = emptyList();
}

// found: the first page. groups: field whose values are shown once each.
export function drawList(found, wanted, groups) {
  const hadFocus = $("lists").contains(document.activeElement);
  clearLists();
  const isSorted = hasSubject(wanted) && found.count !== undefined;
  list = { ...emptyList(), wanted, scale: scaleOf(found), frame: frameOf(found.results), count: found.count, groups, isSorted };
  list.hasLevels = isSorted || found.results.some(({ text_score: contained }) => contained !== undefined);
  $("lists").style.setProperty("--frame", list.frame);
  append(found);
  if (hadFocus) results.focus({ preventScroll: true });
  $("scores").hidden = !hasSubject(wanted) || !found.results.length;
  $("scores").querySelector("summary").textContent = list.hasLevels ? "Why this order?" : `What does ${percent(found.results[0]?.score)} mean?`;
  for (const node of $("scores").querySelectorAll("p")) node.hidden = node.className !== (isSorted ? "of-order" : list.hasLevels ? "of-words" : "of-percent");
  if (isSorted && !found.count) {
    showNothing(`Nothing fits “${wanted.q}” well`, "Sorted by “best match”, the list shows the images that come nearest.");
    $("clear-filters").hidden = !hasFilter(wanted);
  } else if (!found.results.length) {
    showNothing(hasFilter(wanted) ? "No images have all of these filters" : "No images are here", "");
    $("clear-filters").hidden = !hasFilter(wanted);
  } else if (found.nothing_fits && !isSorted) {
    const [subject, more] = queryOf(wanted) ? [`“${queryOf(wanted)}”`, " Other words may find more."] : ["this image", ""];
    showNothing(`Nothing fits ${subject} well`, `These are the images that come nearest.${more}`);
  }
}

// Explains the first cards of both lists, one after the other, so that the first is there at once; or no card.
export async function explainLists(isWanted) {
  const mine = list, { wanted, left: { signal } } = mine, isOn = isWanted && hasSubject(wanted);
  if (isOn === mine.isExplained) return;
  mine.isExplained = isOn;
  drawLegend($("legend"), isOn, /\S\s+\S/.test(wanted.q));
  if (!isOn) {
    for (const node of document.querySelectorAll(".card:is(.explained, .explaining)")) explainCard(node, null);
    return;
  }
  const waiting = [[results, list.results, wanted.in], [$("others"), list.others, wanted.beside]].flatMap(([place, shown, name]) => {
    return [...place.querySelectorAll(".card")].slice(0, EXPLAINED).map((node, i) => ({ node, result: shown[i], name }));
  });
  for (const { node } of waiting) node.classList.add("explaining");
  for (const { node, result, name } of waiting) {
    try {
      await urgent?.catch(() => {});
      if (signal.aborted || !mine.isExplained) return;
      explainCard(node, await explanationOf(result, wanted, page.base(name)));
    } catch (reason) {
      if (signal.aborted) return;
      explainCard(node, null);
      node.querySelector(".words").textContent = reason.message;
      node.querySelector(".words").hidden = false;
    }
  }
}

function explanationOf(result, wanted, base) {
  result.explaining ??= loadExplanation(wanted, base, result.id, list.left.signal).then(
    (explanation) => (result.explanation = explanation),
    (reason) => {
      result.explaining = null; // to be asked for again
      throw reason;
    },
  );
  return result.explaining;
}

// Explains a result before those that wait.
export const explainNow = (result, wanted, base) => (urgent = explanationOf(result, wanted, base));

// True for a result that hardly fits; never without a cut-off.
const isWeak = ({ level }, { cutoff }) => !list.isSorted && cutoff !== undefined && level !== "likely";

function showNothing(lead, why) {
  nothing.querySelector(".lead").textContent = lead;
  nothing.querySelector(".why").textContent = why;
  nothing.hidden = false;
  $("clear-filters").hidden = true;
}

function append(found) {
  const { wanted } = list;
  nameResults(found);
  list.results.push(...found.results);
  list.next = wanted.beside && hasSubject(wanted) ? undefined : found.next_offset;
  const weak = found.results.map((result) => isWeak(result, found)), end = weak.lastIndexOf(false) + 1;
  const cards = found.results.map((result, i) => card(result, wanted.in, list.scale, weak[i]));
  list.fitting += weak.filter((each) => !each).length;
  if (!list.isDivided && list.fitting && end < weak.length) { // below some that do not fit may be one that the words find
    cards.splice(end, 0, makeDivider());
    list.isDivided = true;
  }
  results.append(...cards);
  list.facts = facts(found);
  drawFacts();
  observer.unobserve($("more"));
  if (canGrow()) observer.observe($("more")); // again, so that it reports even if it stayed visible
}

// Returns the aspect ratio of the frames: that of the middle image, so most fill theirs.
function frameOf(shown) {
  const known = shown.filter(({ width, height }) => width && height);
  if (!known.length) return 1;
  const ratios = known.map(({ width, height }) => width / height).sort((a, b) => a - b);
  return Math.min(LONGEST, Math.max(1 / LONGEST, ratios[ratios.length >> 1]));
}

function card(result, name, scale, isWeak) {
  rememberCaption(page.base(name), result);
  return makeCard(result, {
    base: page.base(name), frame: list.frame, scale, isWeak, hasLevels: list.hasLevels,
    href: ({ id }) => page.href(id, name),
    open: ({ id }) => page.open(id, name),
    only: ({ category }) => page.only(category),
    isSelected: (id) => isSelected(id, searchedIn(name)),
    select: ({ id }) => toggleSelected(id, searchedIn(name)),
  });
}

export function drawFacts() {
  $("status").textContent = list.facts;
}

function facts({ took_ms: took, isSelection }) {
  const { wanted } = list, shown = list.results.length;
  const once = list.groups ? `, one for each ${fieldName(list.groups).toLowerCase()}` : "";
  const images = (n) => `${number(n)} ${n === 1 ? "image" : "images"}`;
  if (!hasSubject(wanted)) {
    if (wanted.without) return "“Without” takes things away from a search. Type what to search for, too.";
    return isSelection ? `A selection of ${images(page.total(wanted.in))}` : `${images(list.count)}${once}`;
  }
  const of = hasFilter(wanted) ? ` ${shown === 1 ? "image" : "images"} with these filters` : ` of ${images(page.total(wanted.in))}`;
  if (!shown) return "";
  const found = list.isSorted ? `${images(list.count)} that ${list.count === 1 ? "fits" : "fit"}, sorted${once}` : `The best ${number(shown)}${of}${once}`;
  const fitting = list.fitting && list.fitting < shown ? `, ${number(list.fitting)} of them likely` : "";
  return `${found}${fitting} · ${took < 1000 ? `${Math.max(1, Math.round(took))}\u00a0ms` : `${(took / 1000).toFixed(1)}\u00a0s`}`;
}

// Loads the next page; returns false if there is none or the list has changed.
export async function growList() {
  const mine = list;
  if (mine.isGrowing || !canGrow()) return false;
  mine.isGrowing = true;
  try {
    const found = await loadPage(mine.wanted, page.base(mine.wanted.in), mine.next);
    if (mine !== list) return false;
    append(found);
    return true;
  } catch (reason) {
    if (mine === list) $("status").textContent = reason.message;
    return false;
  } finally {
    mine.isGrowing = false;
  }
}

// Draws the second collection's results, or the error in their place; marks both lists if they share a gallery.
export function drawCompared(found, wanted) {
  $("other").hidden = $("results-name").hidden = false;
  document.body.classList.add("beside");
  $("results-name").textContent = page.nameOf(wanted.in);
  $("other-name").textContent = wanted.beside;
  $("other-status").textContent = found.results ? "" : found.message;
  if (found.results) nameResults(found);
  list.others = found.results ?? [];
  if (!list.others.length) return;
  const scale = scaleOf(found);
  $("others").append(...list.others.map((result) => card(result, wanted.beside, scale, isWeak(result, found))));
  markPlaces(results, list.others, wanted.beside);
  markPlaces($("others"), list.results, page.nameOf(wanted.in));
}
