// Selected images, and the bar that searches by them.

import { markSelected } from "./cards.js";

const $ = (id) => document.getElementById(id);
const selected = new Map(); // id -> result, of one collection

export const isSelected = (id) => selected.has(id);
export const selectedResult = (id) => selected.get(id);

// more, less: called with the ids when a button of the bar is used; the selection is then empty.
export function prepareSelection({ more, less }) {
  const take = (use) => () => {
    const ids = [...selected.keys()];
    clearSelection();
    use(ids);
  };
  $("selected-more").addEventListener("click", take(more));
  $("selected-less").addEventListener("click", take(less));
  $("selected-clear").addEventListener("click", clearSelection);
}

export function toggleSelected(result) {
  if (!selected.delete(result.id)) selected.set(result.id, result);
  for (const card of document.querySelectorAll(".card")) {
    if (card.dataset.id === result.id) markSelected(card, selected.has(result.id));
  }
  drawCount();
}

export function clearSelection() {
  selected.clear();
  for (const card of document.querySelectorAll(".card.selected")) markSelected(card, false);
  drawCount();
}

// canLess: there is a search whose results can be moved away from the selected images.
export function drawSelection(canLess) {
  $("selected-less").disabled = !canLess;
  $("selected-less").title = canLess ? "" : "Search for something first: this moves its results away from these images";
  drawCount();
}

function drawCount() {
  $("selection").hidden = !selected.size;
  $("selected-count").textContent = `${selected.size} selected`;
}
