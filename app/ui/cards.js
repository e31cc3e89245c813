// Renders results as cards, and moves between them by keys.

import { drawMap, drawWords } from "./explain.js";
import { watch } from "./feedback.js";
import { percent, titleOf } from "./format.js";
import { showThumbnail } from "./service.js";

const SIDES = [192, 384]; // pixels of a card's thumbnail
const EVERY = 0.75; // share of the words, by their rarity, from which on a long text has every one

// Returns the range of scores that the bars show: 1 for the best result, 0.1 for the last one of the first page.
export function scaleOf(results) {
  const scores = results.map(({ score }) => score).filter((score) => score !== undefined);
  const top = Math.max(...scores);
  return { top, span: Math.max(top - Math.min(...scores), 1e-6) };
}

// base: path of the collection. scale: see above. isWeak: the result hardly fits. href: address of an opened item.
// isSelected: tells whether an id is selected. open, only, select: called with the result of the card that was used.
export function makeCard(result, { base, scale, isWeak, href, isSelected, open, only, select }) {
  const node = document.getElementById("card").content.cloneNode(true).firstElementChild;
  const find = (name) => node.querySelector(name);
  const title = titleOf(result);
  node.dataset.id = result.id;
  node.classList.toggle("weak", isWeak);
  const image = find("img"), link = find(".open"), category = find(".category"), selected = find(".select");
  if (result.width && result.height) find(".picture").style.setProperty("--ratio", result.width / result.height);
  showThumbnail(image, base, result.id, SIDES, () => find(".frame").classList.add("gone"));
  link.href = href(result);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window
    event.preventDefault();
    open(result);
  });
  find(".caption").textContent = title;
  link.title = title;
  category.textContent = result.category;
  category.title = `Only the category “${result.category}”`;
  category.hidden = !result.category;
  category.addEventListener("click", () => only(result));
  selected.addEventListener("click", () => select(result));
  selected.firstElementChild.textContent = `Select ${title}`;
  markSelected(node, isSelected(result.id));
  if (result.score !== undefined) drawScore(find(".score"), result, scale);
  const others = result.folded?.length ?? (result.group?.count ?? 1) - 1;
  if (others) {
    const near = find(".near");
    near.hidden = false;
    near.textContent = `${others} more`;
    near.title = result.folded ? "Show the images that look nearly the same" : "Show the other images";
    near.addEventListener("click", () => open(result));
  }
  if (result.explanation) {
    node.classList.add("explained");
    image.style.objectFit = result.explanation.fit; // where the image's shape is unknown
    drawMap(find(".map"), result.explanation);
    drawWords(find(".words"), result.explanation.words);
  }
  watch(node, result);
  return node;
}

function drawScore(place, { score, text_score: contained }, { top, span }) {
  place.hidden = false;
  place.querySelector(".number").textContent = percent(score);
  if (contained !== undefined) { // the order follows the words, too, so no bar compares it
    place.querySelector(".track").hidden = true;
    place.querySelector(".said").textContent = contained > EVERY ? "all words" : contained ? "some words" : "";
  }
  place.querySelector(".fill").style.setProperty("--share", Math.min(1, Math.max(0.1, 1 - (0.9 * (top - score)) / span)));
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
