// Selected images, and the bar that searches by them.

import { markSelected } from "./cards.js";

const $ = (id) => document.getElementById(id);
const selected = new Set(); // ids of images of one collection
let owner = ""; // its name
let search = { canLess: false, searched: "" }; // see drawSelection

export const isSelected = (id, name) => name === owner && selected.has(id);

// more, less, teach: called with the ids and their collection when a button of the bar is used; `teach` keeps the selection.
export function prepareSelection({ more, less, teach }) {
  const take = (use) => () => {
    const ids = [...selected];
    clearSelection();
    use(ids, owner);
  };
  $("selected-more").addEventListener("click", take(more));
  $("selected-less").addEventListener("click", take(less));
  $("selected-teach").addEventListener("click", () => teach([...selected], owner));
  $("selected-clear").addEventListener("click", clearSelection);
}

// name: the collection in which the image is searched. Another one than that of the selection starts a new selection.
export function toggleSelected(id, name) {
  if (name !== owner) clearSelection();
  owner = name;
  if (!selected.delete(id)) selected.add(id);
  for (const card of document.querySelectorAll(".card")) {
    if (card.dataset.id === id) markSelected(card, selected.has(id));
  }
  drawBar();
}

export function clearSelection() {
  selected.clear();
  for (const card of document.querySelectorAll(".card.selected")) markSelected(card, false);
  drawBar();
}

// canLess: there is a search whose results can be moved away from images of the searched collection.
export function drawSelection(canLess, searched) {
  search = { canLess, searched };
  drawBar();
}

function drawBar() {
  const why = !search.canLess ? "Search for something first: this moves its results away from these images"
    : owner !== search.searched ? `These images are not in “${search.searched}”, which is searched` : "";
  $("selected-less").disabled = Boolean(why);
  $("selected-less").title = why;
  $("selection").hidden = !selected.size;
  $("selected-count").textContent = `${selected.size} selected`;
}
