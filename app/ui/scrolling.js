// What follows the scrolling of the page: the saved position, and on a phone the search bar.

const SAVE_MS = 150;
const TOP = 160; // pixels within which the bar stays
const PHONE = matchMedia("(max-width: 560px), (max-height: 480px)");

// save: called when the page rests at a new position.
export function followScroll(save) {
  const form = document.getElementById("form");
  let saving = 0, lastTop = 0;
  history.scrollRestoration = "manual"; // the page scrolls to the saved position itself
  addEventListener("scroll", () => {
    clearTimeout(saving);
    saving = setTimeout(save, SAVE_MS);
    if (Math.abs(scrollY - lastTop) < 8 && scrollY > TOP) return;
    const isAway = PHONE.matches && scrollY > TOP && scrollY > lastTop && !form.contains(document.activeElement);
    document.body.classList.toggle("away", isAway); // the bar comes back when the page is scrolled up
    lastTop = scrollY;
  }, { passive: true });
}
