// Renders results as cards, best first, with a divider above results below the calibrated cut-off.

import { drawMap, drawWords } from "./explain.js";

const RETRY_MS = [1500, 4000, 10000]; // delays before an image that failed to load is requested again

// results: of one response. items: URL of the items, relative to the page. minScore: the cut-off. more and only: called
// with the clicked result, for similar items or for its category.
export function makeCards(results, { items, minScore, more, only }) {
  const scores = results.map(({ score }) => score);
  const top = Math.max(...scores), span = Math.max(top - Math.min(...scores), 1e-6);
  const share = (score) => 1 - (0.9 * (top - score)) / span; // 1 for the best result, 0.1 for the last
  const cards = results.map((result) => card(result, items, share(result.score), result.score < minScore, more, only));
  const fitting = scores.filter((score) => score >= minScore).length;
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
    caption.title += "\nOrange parts raise the score, blue parts lower it";
  }
  return node;
}

function load(image, url, frame) { // retries: rate limits count images too
  let tries = 0;
  image.addEventListener("error", () => {
    if (tries === RETRY_MS.length) frame.classList.add("gone");
    else setTimeout(() => (image.src = url), RETRY_MS[tries++] * (0.5 + Math.random()));
  });
  image.src = url;
}

function divider() {
  const node = document.createElement("li");
  node.className = "divider";
  node.textContent = "Less likely";
  return node;
}

// Marks each card with the rank of its item in the other list, if the lists share an item: one gallery, two models.
export function markPlaces(cards, others, name) {
  const place = new Map(others.map(({ id }, i) => [id, i + 1]));
  const items = cards.filter((node) => node.dataset.id !== undefined);
  if (!items.some((node) => place.has(node.dataset.id))) return;
  items.forEach((node, i) => {
    const mark = node.querySelector(".place"), other = place.get(node.dataset.id), gain = other - (i + 1);
    mark.hidden = false;
    mark.textContent = other === undefined ? "only here" : gain > 0 ? `↑ ${gain}` : gain < 0 ? `↓ ${-gain}` : "=";
    mark.role = "img"; // screen readers read the label
    mark.ariaLabel = mark.title = other === undefined ? `not in the first ${others.length} of ${name}` : `rank ${other} in ${name}`;
    mark.classList.toggle("lone", other === undefined);
  });
}
