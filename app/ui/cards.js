// Results as cards, best first, with a line above those that fall below the calibrated cut-off.

import { drawMap, drawWords } from "./explain.js";

const AGAIN_MS = [1500, 4000, 10000]; // when a picture that did not come is asked for again

// results: of one answer. items: where its items are, as seen from the page. least: the cut-off. more and only are called
// with the result that is clicked, for more like it or for its category alone.
export function makeCards(results, { items, least, more, only }) {
  const scores = results.map(({ score }) => score);
  const top = Math.max(...scores), span = Math.max(top - Math.min(...scores), 1e-6);
  const share = (score) => 1 - (0.9 * (top - score)) / span; // 1 for the best, 0.1 for the last one shown
  const cards = results.map((result) => card(result, items, share(result.score), result.score < least, more, only));
  const fitting = scores.filter((score) => score >= least).length;
  if (fitting && fitting < cards.length) cards.splice(fitting, 0, divider());
  return { cards, fitting };
}

function card(result, items, share, weak, more, only) {
  const node = document.getElementById("card").content.cloneNode(true).firstElementChild;
  const find = (name) => node.querySelector(name);
  node.dataset.id = result.id;
  node.classList.toggle("weak", weak);
  load(find("img"), `${items}/${encodeURIComponent(result.id)}/image`, find(".frame"));
  find(".number").textContent = result.score.toFixed(3);
  find(".fill").style.setProperty("--share", share);
  find(".score").title = `cosine ${result.score.toFixed(4)}; the bar compares the results shown`;
  const caption = find(".caption"), category = find(".category");
  caption.textContent = result.caption || result.id;
  caption.title = `${result.caption || result.id}\nFind more like this`;
  caption.addEventListener("click", () => more(result));
  category.textContent = result.category;
  category.title = `Only the category “${result.category}”`;
  category.hidden = !result.category;
  category.addEventListener("click", () => only(result));
  if (result.explanation) {
    node.classList.add("explained");
    find(".picture img").style.objectFit = result.explanation.fit;
    drawMap(find(".map"), result.explanation.relevance);
    drawWords(find(".words"), result.explanation.words);
    caption.title += "\nOrange: this part adds to the score; blue: it takes away";
  }
  return node;
}

function load(image, url, frame) { // tried again: a service that limits how often it is asked counts pictures too
  let tries = 0;
  image.addEventListener("error", () => {
    if (tries === AGAIN_MS.length) frame.classList.add("gone");
    else setTimeout(() => (image.src = url), AGAIN_MS[tries++] * (0.5 + Math.random()));
  });
  image.src = url;
}

function divider() {
  const node = document.createElement("li");
  node.className = "divider";
  node.textContent = "Less likely";
  return node;
}

// Marks each card with where its item stands in the other list, if the two lists have any item in common: one gallery,
// two models.
export function markPlaces(cards, others, name) {
  const place = new Map(others.map(({ id }, i) => [id, i + 1]));
  const items = cards.filter((node) => node.dataset.id !== undefined);
  if (!items.some((node) => place.has(node.dataset.id))) return;
  items.forEach((node, i) => {
    const mark = node.querySelector(".place"), other = place.get(node.dataset.id), gain = other - (i + 1);
    mark.hidden = false;
    mark.textContent = other === undefined ? "only here" : gain > 0 ? `↑ ${gain}` : gain < 0 ? `↓ ${-gain}` : "=";
    mark.role = "img"; // so that what is read out is its label
    mark.ariaLabel = mark.title = other === undefined ? `not among the first ${others.length} of ${name}` : `number ${other} in ${name}`;
    mark.classList.toggle("lone", other === undefined);
  });
}
