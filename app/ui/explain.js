// Draws the explanations of the API: which parts of an image, and which words, matter to its score.

const STRONG = 0.5, AGAINST = 0.65; // shares of the strongest part from which on a part has a frame
const DARKEST = 0.55; // opacity of what does not matter
const SIDE = 360; // pixels of a map
const SLIGHT = 0.08, SOME = 0.4; // shares of the strongest word
const SAYS = {
  most: "matters most", some: "matters", little: "matters little", none: "makes no difference", against: "speaks against",
};

function levelOf(effect, best, most) {
  if (effect <= -SLIGHT * most) return "against";
  if (effect < SLIGHT * most) return "none";
  return effect === best ? "most" : effect >= SOME * most ? "some" : "little";
}

// words: [{word, effect}], the fall of the similarity without the word. A bar compares it with the strongest word.
export function drawWords(place, words = []) {
  const effects = words.map(({ effect }) => effect), best = Math.max(...effects), most = Math.max(...effects.map(Math.abs), 1e-6);
  place.hidden = !words.length;
  place.replaceChildren(...words.map(({ word, effect }) => {
    const node = document.createElement("span"), level = levelOf(effect, best, most), says = document.createElement("small");
    node.className = `word ${level}`;
    node.title = `“${word}” ${SAYS[level]}`;
    node.style.setProperty("--share", Math.abs(effect / most).toFixed(3));
    says.textContent = SAYS[level];
    node.append(Object.assign(document.createElement("b"), { textContent: word, dir: "auto" }), document.createElement("i"), says);
    return node;
  }));
}

// Draws how to read the explanations. hasWords: there are several words, so each has an effect.
export function drawLegend(place, isShown, hasWords) {
  const part = (name, says) => {
    const node = document.createElement("span");
    node.append(Object.assign(document.createElement("span"), { className: `swatch ${name}`, ariaHidden: "true" }), says);
    return node;
  };
  const line = document.createElement("p");
  line.append(part("up", "this part of the image matters most"), part("down", "this part speaks against it"));
  if (hasWords) line.append(part("amount", "how much a word matters: without it, the image is compared again"));
  place.hidden = !isShown;
  place.replaceChildren(...(isShown ? [line] : []));
}

// relevance: rows of patches, each the patch's contribution to the score. What does not matter is darkened; the strongest
// parts have a white frame, those that lower the score a dashed one. fit: how the image becomes the square that the model sees.
export function drawMap(canvas, { relevance, fit }) {
  const rows = relevance.length, columns = relevance[0].length, side = Math.ceil(SIDE / columns);
  const most = Math.max(...relevance.flat().map(Math.abs), 1e-6);
  const veil = Object.assign(document.createElement("canvas"), { width: columns, height: rows }).getContext("2d");
  const shades = veil.createImageData(columns, rows);
  relevance.flat().forEach((value, at) => shades.data.set([8, 8, 20, 255 * DARKEST * (1 - Math.sqrt(Math.max(0, value) / most))], 4 * at));
  veil.putImageData(shades, 0, 0);
  [canvas.width, canvas.height] = [columns * side, rows * side];
  const context = canvas.getContext("2d");
  context.drawImage(veil.canvas, 0, 0, canvas.width, canvas.height);
  frame(context, relevance, side, (value) => value >= STRONG * most, []);
  frame(context, relevance, side, (value) => value <= -AGAINST * most, [12, 10]);
  canvas.dataset.fit = fit;
  canvas.hidden = false;
}

function frame(context, relevance, side, isInside, dash) { // around neighbouring parts together
  const inside = (row, column) => relevance[row]?.[column] !== undefined && isInside(relevance[row][column]);
  context.beginPath();
  relevance.forEach((values, row) => values.forEach((_, column) => {
    if (!inside(row, column)) return;
    const edges = [[-1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1], [0, -1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]];
    for (const [down, right, fromX, fromY, toX, toY] of edges) {
      if (inside(row + down, column + right)) continue;
      context.moveTo((column + fromX) * side, (row + fromY) * side);
      context.lineTo((column + toX) * side, (row + toY) * side);
    }
  }));
  context.lineCap = "round";
  for (const [colour, width] of [["rgb(8 8 20)", 11], ["#fff", 5]]) { // seen on any photo
    [context.strokeStyle, context.lineWidth] = [colour, width];
    context.setLineDash(dash);
    context.stroke();
  }
}
