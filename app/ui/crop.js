// The query image, and the box that chooses the part of it that is searched.

import { images } from "./upload.js";

const WHOLE = Object.freeze({ x: 0, y: 0, width: 1, height: 1 });
const SMALLEST = 0.04; // side of a box, as a share of the image; a smaller one is a click
const STEP = 0.02; // of the arrow keys
const CORNER = 16; // pixels around a corner in which it can be dragged

const $ = (id) => document.getElementById(id);
let box = WHOLE;

// Returns the box of an address, "x,y,width,height", or null for the whole image.
export function parseCrop(text) {
  const [x, y, width, height] = text.split(",").map(Number);
  const isBox = [x, y].every((edge) => edge >= 0) && [width, height].every((side) => side > 0) && x + width < 1.0001 && y + height < 1.0001;
  return isBox ? { x, y, width: Math.min(width, 1 - x), height: Math.min(height, 1 - y) } : null;
}

function formatCrop({ x, y, width, height }) {
  const down = (value) => Math.floor(1e4 * value + 1e-6) / 1e4;
  return width > 0.995 && height > 0.995 ? "" : [x, y, width, height].map(down).join(",");
}

// chosen: called with the text of the box for the address, and true if the keyboard moved it.
export function prepareCrop(chosen) {
  const frame = $("picture-frame");
  const place = ({ clientX, clientY }) => {
    const { left, top, width, height } = frame.getBoundingClientRect();
    return { x: within((clientX - left) / width), y: within((clientY - top) / height) };
  };
  frame.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    const before = box, drag = grab(place(event), frame);
    frame.setPointerCapture(event.pointerId);
    const over = new AbortController(), { signal } = over;
    const end = ({ type }) => {
      over.abort();
      const isDrawn = type === "pointerup" && Math.min(box.width, box.height) >= SMALLEST;
      if (!isDrawn) return drawBox(before);
      $("box").focus({ preventScroll: true });
      if (formatCrop(box) !== formatCrop(before)) chosen(formatCrop(box));
    };
    frame.addEventListener("pointermove", (moved) => drawBox(drag(place(moved))), { signal });
    for (const type of ["pointerup", "pointercancel"]) frame.addEventListener(type, end, { signal });
  });
  $("box").addEventListener("keydown", (event) => {
    const [right, down] = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key] ?? [0, 0];
    if (!right && !down) return;
    event.preventDefault();
    event.stopPropagation();
    const { x, y, width, height } = box;
    drawBox(event.shiftKey
      ? { x, y, width: within(width + right, SMALLEST, 1 - x), height: within(height + down, SMALLEST, 1 - y) }
      : { x: within(x + right, 0, 1 - width), y: within(y + down, 0, 1 - height), width, height });
    chosen(formatCrop(box), true);
  });
  $("whole").addEventListener("click", () => chosen(""));
  $("picture-image").addEventListener("error", () => showPreview(false));
  $("picture-image").addEventListener("load", () => showPreview(true));
}

export function drawPicture({ picture, crop }) {
  const image = images.get(picture);
  $("picture").hidden = !image;
  if (!image) return;
  if ($("picture-image").getAttribute("src") !== image.url) $("picture-image").src = image.url;
  drawBox(parseCrop(crop) ?? WHOLE);
  $("whole").hidden = !crop;
}

function showPreview(isShown) { // HEIC and others are read by the service only
  $("picture-frame").hidden = !isShown;
  $("picture-hint").textContent = isShown
    ? "Drag over a part of the image to search for that part."
    : "This browser cannot show this kind of image.";
}

function drawBox(next) {
  box = next;
  $("box").classList.toggle("everything", !formatCrop(box));
  for (const [edge, share] of [["left", box.x], ["top", box.y], ["width", box.width], ["height", box.height]]) {
    $("box").style.setProperty(edge, `${100 * share}%`);
  }
}

const within = (value, least = 0, most = 1) => Math.min(Math.max(value, least), most);

// Returns the box for each further place of the pointer: a corner is dragged, the box is moved, or a new one is drawn.
function grab(start, frame) {
  const { x, y, width, height } = box, { width: wide, height: high } = frame.getBoundingClientRect();
  if (width < 1 || height < 1) {
    for (const [cornerX, fixedX] of [[x, x + width], [x + width, x]]) {
      for (const [cornerY, fixedY] of [[y, y + height], [y + height, y]]) {
        if (Math.hypot((start.x - cornerX) * wide, (start.y - cornerY) * high) <= CORNER) return (to) => between({ x: fixedX, y: fixedY }, to);
      }
    }
    if (start.x > x && start.x < x + width && start.y > y && start.y < y + height) {
      return (to) => ({ x: within(x + to.x - start.x, 0, 1 - width), y: within(y + to.y - start.y, 0, 1 - height), width, height });
    }
  }
  return (to) => between(start, to);
}

const between = (a, b) => ({ x: Math.min(a.x, b.x), y: Math.min(a.y, b.y), width: Math.abs(a.x - b.x), height: Math.abs(a.y - b.y) });
