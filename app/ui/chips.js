// The parts of a search that are no words, as chips in the search bar: names, an image, items, and items to avoid.

import { titleOf } from "./format.js";
import { clearImages, loadItem, showThumbnail } from "./service.js";
import { images } from "./upload.js";

const SIDES = [192, 192];
const captions = new Map(); // path of a collection and id -> caption

export const rememberCaption = (base, item) => captions.set(base + item.id, titleOf(item));

// Returns the labels. base: path of the collection. remove: called with the part of the state whose chip was removed.
// open: called with the name whose chip was clicked. changed: called when a caption has arrived that was not known.
export function drawChips(place, state, base, { remove, open, changed }) {
  const chips = state.concepts.map((name) => makeChip("concepts", `@${name}`, null, () => remove("concepts", name), () => open(name)));
  const add = (part, label, showImage) => chips.push(makeChip(part, label, showImage, () => remove(part)));
  if (images.has(state.picture)) {
    const { file, url } = images.get(state.picture);
    add("picture", file.name || "pasted image", (image) => (image.src = url));
  }
  for (const [part, words] of [["like", "like"], ["unlike", "not like"]]) {
    const ids = state[part];
    if (!ids.length) continue;
    const label = ids.length === 1 ? captionOf(base, ids[0], changed) : `${ids.length} images`;
    add(part, `${words} ${label}`, (image) => showThumbnail(image, base, ids[0], SIDES));
  }
  clearImages(place);
  place.append(...chips);
  return chips.map(({ title }) => title);
}

function captionOf(base, id, changed) {
  if (!captions.has(base + id)) { // a link: the item has not been shown yet
    captions.set(base + id, id);
    loadItem(base, id).then((item) => {
      rememberCaption(base, item);
      changed();
    }, () => {});
  }
  return captions.get(base + id);
}

function makeChip(part, label, showImage, remove, open) {
  const node = document.createElement("span"), image = document.createElement("img"), text = document.createElement(open ? "button" : "span");
  const button = document.createElement("button");
  Object.assign(node, { className: `chip chip-${part}`, title: label });
  Object.assign(image, { alt: "", width: 32, height: 32 });
  Object.assign(text, { textContent: label, dir: "auto", ...(open && { type: "button", className: "link", title: `Show all of ${label}`, onclick: open }) });
  Object.assign(button, { type: "button", textContent: "×", ariaLabel: `Remove “${label}” from the search` });
  button.addEventListener("click", remove);
  if (part === "picture") image.onerror = () => image.remove(); // a format that the browser cannot show
  showImage?.(image);
  node.append(...(showImage ? [image] : []), text, button);
  return node;
}
