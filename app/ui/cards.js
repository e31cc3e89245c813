// Renders results as cards, and moves between them by keys.

import { drawMap, drawWords } from "./explain.js";
import { watch } from "./feedback.js";
import { number, percent, titleOf } from "./format.js";
import { showThumbnail } from "./service.js";
import { cardSize } from "./size.js";

const SMALL = [192, 384], LARGE = [384, 384]; // pixels of a card's thumbnail, for screens of one and two dots per pixel
const LARGE_CARD = 220; // pixels of a card from which on it has a large one
const TINY = 100; // pixels of an image that is not enlarged over its whole card
const CROPPED = 2.5; // times that an image may be longer than its frame, to fill it
const SAMPLE = 40; // pixels of the square that is looked at
const PALE = 236; // of 255: every corner of a picture on white
const LEVELS = { likely: "good match", possible: "possible", unlikely: "unlikely" };
const EVERY = 0.75; // share of the words, by their rarity, from which on a long text has every one

// Returns the range of scores that the bars show: 1 for the best result, 0.1 for the last one of the first page.
export function scaleOf({ results, cutoff }) {
  const scores = results.map(({ score }) => score).filter((score) => score !== undefined);
  const top = Math.max(...scores);
  return { top, span: Math.max(top - Math.min(...scores), 1e-6), hasCutoff: cutoff !== undefined };
}

const corners = Object.assign(document.createElement("canvas"), { width: SAMPLE, height: SAMPLE }).getContext("2d", { willReadFrequently: true });
const again = new WeakMap(); // image element of a card -> shows its thumbnail in the present size

// Marks a node by what its picture needs behind it on a dark page: "clear" for a transparent one, "pale" for one on white.
export function markGround(node, image) {
  const ground = groundOf(image);
  node.classList.toggle("pale", ground === "pale");
  node.classList.toggle("clear", ground === "clear");
}

function groundOf(image) {
  try {
    corners.clearRect(0, 0, SAMPLE, SAMPLE);
    corners.drawImage(image, 0, 0, SAMPLE, SAMPLE);
    const { data } = corners.getImageData(0, 0, SAMPLE, SAMPLE), end = SAMPLE * SAMPLE - 1;
    if (data.some((value, at) => at % 4 === 3 && value < 128)) return "clear";
    return [0, SAMPLE - 1, end - SAMPLE + 1, end].every((at) => Math.min(...data.slice(4 * at, 4 * at + 3)) >= PALE) ? "pale" : "";
  } catch {
    return ""; // it cannot be drawn
  }
}

// Shows the thumbnails in the size that the cards have now.
export function sharpenCards() {
  for (const image of document.querySelectorAll(".card img")) again.get(image)?.();
}

// base: path of the collection. frame: aspect ratio of the cards' frames. scale: see above. isWeak: the result hardly
// fits. hasLevels: the order is not that of the scores, so a word stands in place of the percentage. href: address of an opened item.
// isSelected: tells whether an id is selected. open, only, select: called with the result of the card that was used.
export function makeCard(result, { base, frame, scale, isWeak, hasLevels, href, isSelected, open, only, select }) {
  const node = document.getElementById("card").content.cloneNode(true).firstElementChild;
  const find = (name) => node.querySelector(name);
  const title = titleOf(result);
  node.dataset.id = result.id;
  node.classList.toggle("weak", isWeak);
  const image = find("img"), link = find(".open"), category = find(".category"), selected = find(".select");
  const { width, height } = result, ratio = width / height || 1;
  if (width && height) find(".picture").style.setProperty("--ratio", ratio);
  node.classList.toggle("whole", Math.min(width, height) < TINY || Math.max(ratio / frame, frame / ratio) > CROPPED);
  image.addEventListener("load", () => markGround(node, image));
  let sides = null;
  const show = () => {
    const wanted = cardSize() > LARGE_CARD ? LARGE : SMALL;
    if (wanted !== sides) showThumbnail(image, base, result.id, (sides = wanted), () => find(".frame").classList.add("gone"));
  };
  again.set(image, show);
  show();
  link.href = href(result);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window
    event.preventDefault();
    open(result);
  });
  find(".caption").textContent = title;
  link.title = title;
  const product = [result.metadata?.brand, result.metadata?.price].filter((value) => typeof value === "string" || typeof value === "number");
  find(".product").textContent = product.map((value) => (typeof value === "number" ? number(value) : value)).join(" · ");
  find(".product").hidden = !product.length;
  category.textContent = result.category;
  category.title = `Only the category “${result.category}”`;
  category.hidden = !result.category;
  category.addEventListener("click", () => only(result));
  selected.addEventListener("click", () => select(result));
  selected.firstElementChild.textContent = `Select ${title}`;
  markSelected(node, isSelected(result.id));
  if (result.score !== undefined) drawScore(find(".score"), result, scale, hasLevels);
  const others = result.folded?.length ?? (result.group?.count ?? 1) - 1;
  if (others) {
    const near = find(".near");
    near.hidden = false;
    near.textContent = `${others} more`;
    near.title = result.folded ? "Show the images that look nearly the same" : "Show the other images";
    near.addEventListener("click", () => open(result));
  }
  watch(node, result);
  return node;
}

function drawScore(place, { score, level, text_score: contained }, { top, span, hasCutoff }, hasLevels) {
  place.hidden = false;
  place.classList.toggle("level", hasLevels);
  place.querySelector(".number").textContent = !hasLevels ? percent(score) : hasCutoff ? LEVELS[level] : "";
  place.querySelector(".track").hidden = hasLevels;
  place.querySelector(".said").textContent = contained > EVERY ? "all words" : contained ? "some words" : "";
  place.querySelector(".fill").style.setProperty("--share", Math.min(1, Math.max(0.1, 1 - (0.9 * (top - score)) / span)));
}

// explanation: null for none.
export function explainCard(node, explanation) {
  node.classList.toggle("explained", Boolean(explanation));
  node.classList.remove("explaining");
  node.querySelector("img").style.objectFit = explanation?.fit ?? ""; // where the image's shape is unknown
  node.querySelector(".map").hidden = !explanation;
  if (explanation) drawMap(node.querySelector(".map"), explanation);
  drawWords(node.querySelector(".words"), explanation?.words);
}

export function markSelected(card, isSelected) {
  card.classList.toggle("selected", isSelected);
  card.querySelector(".select").setAttribute("aria-pressed", isSelected);
}

export function makeDivider() {
  const node = document.createElement("li");
  node.className = "divider";
  node.textContent = "Less likely";
  return node;
}

// Moves the focus from card to card (arrows, Home, End), or selects the card (x). Returns true if the key was used.
export function handleCardKey(event) {
  const here = event.target.closest?.(".card .open");
  if (!here || event.ctrlKey || event.metaKey || event.altKey) return false;
  if (event.key.toLowerCase() === "x") {
    here.closest(".card").querySelector(".select").click();
    return true;
  }
  const links = [...here.closest("ol").querySelectorAll(".open")], at = links.indexOf(here);
  const target = {
    ArrowRight: () => links[at + 1],
    ArrowLeft: () => links[at - 1],
    ArrowDown: () => nearestInRow(here, links.slice(at + 1), 1),
    ArrowUp: () => nearestInRow(here, links.slice(0, at).reverse(), -1),
    Home: () => links[0],
    End: () => links.at(-1),
  }[event.key];
  if (!target) return false;
  event.preventDefault();
  target()?.focus();
  return true;
}

function nearestInRow(here, links, direction) { // the next row, and in it the link closest to this column
  const from = here.getBoundingClientRect();
  const boxes = links.map((link) => ({ link, box: link.getBoundingClientRect() }));
  const beyond = boxes.filter(({ box }) => direction * (box.top - from.top) > 4);
  const row = beyond.filter(({ box }) => Math.abs(box.top - beyond[0].box.top) < 4);
  row.sort((a, b) => Math.abs(a.box.left - from.left) - Math.abs(b.box.left - from.left));
  return row[0]?.link;
}
