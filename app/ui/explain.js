// Draws the explanations of the API: the effect of each word, and the contribution of each image part as an overlay.

const VISIBLE = 0.15; // smallest share of the strongest part that is drawn
const STRONGEST = 130; // opacity of 255: the image stays recognisable

// words: [{word, effect}], the fall of the similarity without the word. The word of the largest fall has the darkest background.
export function drawWords(place, words) {
  const most = Math.max(...(words ?? []).map(({ effect }) => effect), 1e-6);
  place.hidden = !words?.length;
  place.replaceChildren(...(words ?? []).map((each) => drawWord(each, most)));
}

function drawWord({ word, effect }, most) {
  const node = document.createElement("span"), number = document.createElement("small");
  const points = Math.round(100 * effect);
  node.className = "word";
  node.textContent = word;
  number.textContent = `${points > 0 ? "+" : ""}${points}`.replace("-", "−");
  node.append(number);
  node.title = `“${word}” ${points < 0 ? "lowers" : "raises"} the percentage by ${Math.abs(points)}`;
  node.style.setProperty("--heat", (Math.max(effect, 0) / most).toFixed(3));
  return node;
}

// Draws how to read the explanations. hasWords: effects of words are shown. hasMaps: overlays are shown.
export function drawLegend(place, hasWords, hasMaps) {
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
  if (hasWords) lines.push(line("A word's number is what it adds to the percentage: it is left out, and the image compared again."));
  if (hasMaps) lines.push(line(part("up", "this part of the image raises the percentage"), part("down", "this part lowers it")));
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
