// Draws the explanations of the API: word weights, and the contribution of each image part as an overlay.

import { percent } from "./format.js";

const VISIBLE = 0.15; // smallest share of the strongest part that is drawn
const STRONGEST = 130; // opacity of 255: the image stays recognisable
const SAME = 0.02; // weights that differ from the average by less say nothing

// words: [{word, weight}]; weight 1 is the average. A heavier word gets a darker background.
export function drawWords(place, words) {
  place.hidden = !words?.length;
  place.replaceChildren(...(words ?? []).map(drawWord));
}

function drawWord({ word, weight }) {
  const node = document.createElement("span"), number = document.createElement("small");
  node.className = "word";
  node.textContent = word;
  number.textContent = percent(weight);
  node.append(number);
  node.title = `${inWords({ word, weight })}; an average word has 100%`;
  node.style.setProperty("--heat", Math.min(Math.max(weight - 0.5, 0), 1).toFixed(3));
  return node;
}

function inWords({ word, weight }) {
  const difference = percent(Math.abs(weight - 1));
  return `“${word}” counts ${difference === "0%" ? "the same" : `${difference} ${weight > 1 ? "more" : "less"}`}`;
}

// Draws how to read the explanations. words: those of the query, null without any. hasMaps: overlays are shown.
export function drawLegend(place, words, hasMaps) {
  const line = (...parts) => {
    const node = document.createElement("p");
    node.append(...parts);
    return node;
  };
  const part = (name, says) => {
    const node = document.createElement("span");
    node.append(Object.assign(document.createElement("span"), { className: `swatch ${name}`, ariaHidden: "true" }), says);
    return node;
  };
  const lines = [];
  if (hasMaps) lines.push(line(part("up", "this part of the image raises the percentage"), part("down", "this part lowers it")));
  if (words?.length) {
    const drawn = Object.assign(document.createElement("div"), { className: "words" });
    drawWords(drawn, words);
    lines.unshift(drawn);
    const far = [...words].sort((a, b) => Math.abs(b.weight - 1) - Math.abs(a.weight - 1)).slice(0, 2);
    const says = far.every(({ weight }) => Math.abs(weight - 1) < SAME)
      ? "This model counts all words of a search alike."
      : `An average word has 100%: ${far.map(inWords).join(", ")}.`;
    if (words.length > 1) lines.push(line(says));
  }
  place.hidden = !lines.length;
  place.replaceChildren(...lines);
}

// relevance: rows of patches, each the patch's contribution to the score. Positive patches are tinted orange, negative
// ones blue. fit: how the image becomes the square that the model sees.
export function drawMap(canvas, { relevance, fit }) {
  const rows = relevance.length, columns = relevance[0].length;
  const most = Math.max(...relevance.flat().map(Math.abs), 1e-6);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  relevance.flat().forEach((value, at) => {
    const strength = Math.abs(value) / most;
    const colour = value > 0 ? [255, 120, 0] : [40, 90, 255];
    image.data.set([...colour, strength < VISIBLE ? 0 : STRONGEST * strength], 4 * at);
  });
  context.putImageData(image, 0, 0);
  canvas.dataset.fit = fit;
  canvas.hidden = false;
}
