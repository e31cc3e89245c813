// The size of the cards, which a slider sets and the browser remembers.

const SIZE = "dcar.size";
const [LEAST, MOST, SHARE] = [150, 220, 0.1]; // pixels of a card before the slider is moved, and its share of the window

const slider = document.getElementById("size");

// Returns the least width of a card in pixels.
export const cardSize = () => Number(slider.value);

// changed: called when the slider has moved.
export function prepareSize(changed) {
  let saved = null;
  try {
    saved = localStorage.getItem(SIZE);
  } catch { // not allowed here
  }
  slider.value = saved ?? Math.min(MOST, Math.max(LEAST, innerWidth * SHARE));
  const draw = () => document.documentElement.style.setProperty("--card", `${cardSize()}px`);
  draw();
  slider.addEventListener("input", () => {
    draw();
    changed();
  });
  slider.addEventListener("change", () => {
    try {
      localStorage.setItem(SIZE, slider.value);
    } catch { // not allowed here
    }
  });
}
