// The dialog that shows one image large, with its metadata and what can be done with it.

import { markGround } from "./cards.js";
import { drawLegend, drawMap, drawWords } from "./explain.js";
import { report } from "./feedback.js";
import { conditionName, fieldName, percent, titleOf } from "./format.js";
import { clearImages, download, imagePath, loadGroup, loadItem, savedKey, showThumbnail } from "./service.js";

const SIDES = [1280, 1280];
const NEAR_SIDES = [192, 384];
const SWIPE = 50; // pixels
const RATINGS = [["fits", 3], ["misfits", 0]]; // buttons that judge the image

const $ = (id) => document.getElementById(id);
const dialog = $("detail");
let shown = null; // {id, base, result, explain} of the opened item
let isExplained = null; // the map and the words are wanted; null until the dialog is open
let actions = null;

// on: {step(direction), similar(id), less(id), only(category), open(id), close(), link(id)}, called when they are used.
export function prepareDetail(on) {
  actions = on;
  $("close").addEventListener("click", on.close);
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    on.close();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && on.close()); // the backdrop
  $("previous").addEventListener("click", () => on.step(-1));
  $("next").addEventListener("click", () => on.step(1));
  $("similar").addEventListener("click", () => on.similar(shown.id));
  $("less").addEventListener("click", () => on.less(shown.id));
  $("detail-category").addEventListener("click", () => on.only($("detail-category").textContent));
  $("copy").addEventListener("click", async () => say((await copy(on.link(shown.id))) ? "Link copied." : "Copying is not allowed here."));
  $("detail-image").addEventListener("load", ({ target }) => markGround(target, target));
  $("download").addEventListener("click", (event) => {
    if (!savedKey()) return; // the link itself works
    event.preventDefault();
    download(shown.base, shown.id, $("download").download).catch(({ message }) => say(message));
  });
  dialog.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!direction || event.ctrlKey || event.metaKey || event.altKey) return; // "Back" of the browser
    event.preventDefault();
    on.step(direction);
  });
  for (const [id, rating] of RATINGS) $(id).addEventListener("click", () => judge(rating));
  $("why").addEventListener("click", () => {
    isExplained = !isExplained;
    drawWhy();
  });
  let start = null;
  dialog.addEventListener("touchstart", ({ touches }) => (start = touches.length === 1 ? touches[0] : null), { passive: true });
  dialog.addEventListener("touchend", ({ changedTouches: [end] }) => {
    if (!start || visualViewport.scale > 1.01) return; // the enlarged page was moved
    const across = end.clientX - start.clientX, down = end.clientY - start.clientY;
    if (Math.abs(across) > SWIPE && Math.abs(across) > 2 * Math.abs(down)) on.step(across < 0 ? 1 : -1);
    start = null;
  });
}

// result: what the list knows of the item, or undefined. canLess: there is a search to subtract it from. groups: field
// whose values are shown once each in lists. hides: tells whether a field is left out. explain: returns a promise of what
// matters to the result, or null. isExplained: it is wanted from the beginning.
export async function openDetail({ id, base, result, canLess, groups, hides, explain, isExplained: isWanted, hasPrevious, hasNext }) {
  let isNew = false;
  if (shown?.id !== id || shown.base !== base) {
    shown = { id, base };
    $("detail-image").removeAttribute("src");
    showThumbnail($("detail-image"), base, id, SIDES, () => say("The image is no longer in the gallery."));
    $("download").href = imagePath(base, id);
    say("");
    draw(result ?? { id }, hides);
    isNew = true;
  }
  Object.assign(shown, { result, explain });
  isExplained ??= isWanted;
  drawWhy();
  drawJudgement();
  $("less").hidden = !canLess;
  $("previous").disabled = !hasPrevious;
  $("next").disabled = !hasNext;
  if (!dialog.open) {
    const root = document.documentElement;
    root.style.setProperty("--scrollbar", `${innerWidth - root.clientWidth}px`);
    dialog.showModal();
    $("detail-title").focus();
  }
  const isShown = () => shown?.id === id && shown.base === base;
  let item = result;
  if (!item?.metadata) { // a link: no list knows the item
    item = await loadItem(base, id).catch(({ message }) => say(message));
    if (!item || !isShown()) return;
    draw({ ...result, ...item }, hides);
  }
  const value = groups && isNew ? (item.metadata[groups] ?? item[groups]) : undefined;
  if (value === undefined || value === "") return;
  const all = await loadGroup(base, groups, value).catch(() => []); // the image itself is there
  if (isShown()) drawNear(all.map((each) => each.id).filter((each) => each !== id), `Same ${fieldName(groups).toLowerCase()}`);
}

export function closeDetail() {
  shown = isExplained = null;
  if (dialog.open) dialog.close();
}

async function drawWhy() {
  const mine = shown, { result, explain } = mine, isOn = Boolean(explain) && isExplained, stage = $("stage");
  $("why").hidden = !explain;
  $("why").setAttribute("aria-pressed", isOn);
  $("detail-map").hidden = $("detail-words").hidden = true;
  drawLegend($("detail-legend"), false);
  stage.classList.toggle("explaining", isOn && !result.explanation);
  if (!isOn) return;
  let fault = "";
  const explanation = await explain().catch(({ message }) => (fault = message) && null);
  if (shown !== mine || !isExplained) return;
  stage.classList.remove("explaining");
  if (fault) say(fault);
  if (!explanation) return;
  drawMap($("detail-map"), explanation);
  drawWords($("detail-words"), explanation.words);
  drawLegend($("detail-legend"), true, Boolean(explanation.words));
}

function judge(rating) {
  shown.result.rating = rating;
  report(shown.result, "judge", { rating });
  drawJudgement();
}

function drawJudgement() {
  $("judge").hidden = !shown.result?.query_id;
  for (const [id, rating] of RATINGS) $(id).setAttribute("aria-pressed", shown.result?.rating === rating);
}

function say(message) {
  $("detail-message").textContent = message;
}

function draw(item, hides) {
  const title = titleOf(item);
  $("detail-title").textContent = title;
  const frame = $("detail-frame"), { width, height } = item;
  $("detail-image").alt = title;
  frame.classList.toggle("sized", Boolean(width && height)); // takes its place before it is loaded
  frame.style.setProperty("--width", `${width}px`);
  frame.style.setProperty("--ratio", width / height);
  $("detail-category").textContent = item.category ?? "";
  $("detail-category").hidden = !item.category;
  $("detail-category").title = `Only the category “${item.category}”`;
  $("download").download = fileName(item);
  drawNear(item.folded ?? [], "Nearly the same");
  const facts = Object.entries(item.metadata ?? {}).filter(([name, value]) => !hides(name) && value !== null && value !== "" && !(Array.isArray(value) && !value.length));
  const similarity = item.score === undefined ? [] : [["Similarity", percent(item.score)]];
  const described = item.caption && item.caption !== title ? [["Caption", item.caption]] : [];
  $("metadata").replaceChildren(...[...described, ["Id", item.id], ...facts.map(([name, value]) => [fieldName(name), value]), ...similarity].flatMap(([name, value]) => {
    const term = document.createElement("dt"), detail = document.createElement("dd");
    term.textContent = name;
    detail.dir = "auto";
    detail.append(drawValue(value));
    return [term, detail];
  }));
}

function drawValue(value) {
  const text = Array.isArray(value) ? value.map(String).join(", ") : typeof value === "boolean" ? conditionName(value) : typeof value === "object" ? JSON.stringify(value) : String(value).replace(/^(\d{4}-\d\d-\d\d)T/, "$1 ");
  if (!/^https?:\/\/\S+$/.test(text)) return text;
  return Object.assign(document.createElement("a"), { href: text, textContent: text, rel: "noreferrer", target: "_blank" });
}

function drawNear(ids, title) {
  $("folded").hidden = !ids.length;
  $("folded").querySelector("h3").textContent = title;
  const list = $("folded").querySelector("ul");
  clearImages(list);
  list.append(...ids.map((id) => {
    const entry = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    image.alt = `Open ${id}`;
    showThumbnail(image, shown.base, id, NEAR_SIDES);
    button.append(image);
    button.addEventListener("click", () => actions.open(id));
    entry.append(button);
    return entry;
  }));
}

function fileName({ id, metadata }) {
  const name = String(metadata?.file_name ?? id).split("/").pop();
  return name || "image";
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not allowed without https
    const field = Object.assign(document.createElement("textarea"), { value: text, className: "visually-hidden" });
    dialog.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    return copied;
  }
}
