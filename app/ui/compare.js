// Marks each card with the rank of its item in the other list, if the lists share an item: one gallery, two models.

export function markPlaces(list, others, name) {
  const place = new Map(others.map(({ id }, i) => [id, i + 1]));
  const cards = [...list.querySelectorAll(".card")];
  if (!cards.some((node) => place.has(node.dataset.id))) return;
  cards.forEach((node, i) => {
    const mark = node.querySelector(".place"), other = place.get(node.dataset.id), gain = other - (i + 1);
    mark.hidden = false;
    mark.textContent = other === undefined ? "only here" : gain > 0 ? `↑ ${gain}` : gain < 0 ? `↓ ${-gain}` : "=";
    mark.role = "img"; // screen readers read the label
    mark.ariaLabel = mark.title = other === undefined ? `not in the first ${others.length} of ${name}` : `rank ${other} in ${name}`;
    mark.classList.toggle("lone", other === undefined);
  });
}
