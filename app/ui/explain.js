// Draws the explanations of the API: word weights, and the contribution of each image part as an overlay.

// words: [{word, weight}]; weight 1 is the average. A heavier word gets a darker background.
export function drawWords(place, words) {
  place.hidden = !words?.length;
  place.replaceChildren(
    ...(words ?? []).map(({ word, weight }) => {
      const node = document.createElement("span");
      const number = document.createElement("small");
      node.className = "word";
      node.textContent = word;
      number.textContent = weight.toFixed(2);
      node.append(number);
      node.title = `${word}: weight ${weight.toFixed(3)}; 1 is the average`;
      node.style.setProperty("--heat", Math.min(Math.max(weight - 0.5, 0), 1).toFixed(3));
      return node;
    }),
  );
}

// relevance: rows of patches, each the patch's contribution to the score. Positive patches are tinted orange, negative
// ones blue.
export function drawMap(canvas, relevance) {
  const rows = relevance.length, columns = relevance[0].length;
  const most = Math.max(...relevance.flat().map(Math.abs), 1e-6);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  relevance.flat().forEach((value, at) => {
    const strength = value / most;
    image.data.set(strength > 0 ? [255, 120, 0, 200 * strength] : [40, 90, 255, -150 * strength], 4 * at);
  });
  context.putImageData(image, 0, 0);
  canvas.hidden = false;
}
