// The insights page: figures of the feedback log, and queries that disappoint.

import { number, percent } from "./format.js";
import { clearImages, loadInsights, savedKey, saveKey, showThumbnail } from "./service.js";

const KEY = "dcar.admin";
const SIDES = [192, 192]; // pixels of a thumbnail
const SHOWN = 10; // queries that are shown at first

const $ = (id) => document.getElementById(id);
let collection = new URLSearchParams(location.hash.slice(1)).get("in") ?? "";
const base = () => (collection ? `../collections/${encodeURIComponent(collection)}/` : "../");

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const share = (part, whole) => (whole ? part / whole : 0);
const ofSearches = (count) => `${number(count)} ${count === 1 ? "search" : "searches"}`;

function table(caption, heads, rows) {
  const cells = (kind, values) => make("tr", {}, ...values.map((value) => (value instanceof Node ? value : make(kind, { textContent: value }))));
  const head = cells("th", heads);
  for (const cell of head.children) cell.scope = "col";
  return [make("caption", { className: "visually-hidden", textContent: caption }), make("thead", {}, head), make("tbody", {}, ...rows.map((row) => cells("td", row)))];
}

// Draws bars. each: {label, parts: heights in order from below, said: text above the bar, told: title}.
function drawBars(place, name, bars, top, heads, rows, numbered) {
  const drawn = bars.map(({ parts, said, told }, i) => {
    const bar = make("span", { className: "column", title: told });
    const sum = parts.reduce((a, b) => a + b, 0);
    bar.style.setProperty("--share", share(sum, top));
    parts.forEach((part, place) => {
      const piece = make("i", { className: ["one", "two", "three"][place] });
      piece.style.setProperty("--part", 100 * share(part, sum)); // a sum below 1 would not fill the bar
      if (part) bar.append(piece);
    });
    if (said) bar.append(make("b", { textContent: said, className: bars.length > 12 && i % 4 ? "few" : "" }));
    return bar;
  });
  const chart = make("div", { className: "bars", role: "img", ariaLabel: `${name}; the table below has the numbers` }, ...drawn);
  const labels = numbered ? bars.map(({ label }) => label) : [bars[0]?.label, bars.at(-1)?.label].filter((label, i, all) => label && all.indexOf(label) === i);
  const scale = make("div", { className: numbered ? "scale numbers" : "scale", ariaHidden: "true" }, ...labels.map((label) => make("span", { textContent: label })));
  const inside = make("div", { className: "wide", tabIndex: 0, role: "region", ariaLabel: `${name} as a table` }, make("table", {}, ...table(name, heads, rows)));
  place.replaceChildren(chart, scale, make("details", {}, make("summary", { textContent: "Show as a table" }), inside));
}

function drawDays(days) {
  const top = Math.max(1, ...days.map(({ searches }) => searches));
  const bars = days.map(({ day, searches, clicked, nothing }) => {
    const unmet = Math.min(nothing, searches - clicked); // a clicked one counts as clicked
    const told = `${day}: ${ofSearches(searches)}, ${number(clicked)} with a click, nothing fits in ${number(nothing)}`;
    return { label: day, parts: [clicked, searches - clicked - unmet, unmet], told, said: days.length > 15 ? "" : number(searches) };
  });
  const heads = ["Day", "Searches", "With a click", "Nothing fits"];
  drawBars($("days"), "Searches per day", bars, top, heads, days.map((each) => [each.day, ...[each.searches, each.clicked, each.nothing].map(number)]), false);
}

function drawPositions(positions) {
  const top = Math.max(0.001, ...positions.map(({ shown, clicked }) => share(clicked, shown)));
  const bars = positions.map(({ position, shown, clicked }) => {
    const rate = share(clicked, shown);
    return { label: position, parts: [rate], said: percent(rate), told: `Position ${position}: ${number(clicked)} clicks of ${number(shown)}` };
  });
  const rows = positions.map(({ position, shown, clicked }) => [position, number(shown), number(clicked), percent(share(clicked, shown))]);
  drawBars($("positions"), "Click-through by position", bars, top, ["Position", "Shown", "Clicked", "Click-through"], rows, true);
}

function drawQueries(list, queries) {
  clearImages(list);
  const nodes = queries.map((each, i) => {
    const node = drawQuery(each);
    node.hidden = i >= SHOWN;
    return node;
  });
  list.append(...(nodes.length ? nodes : [make("li", { className: "none", textContent: "None." })]));
  if (nodes.length > SHOWN) {
    const more = make("button", { type: "button", className: "link", textContent: `Show all ${nodes.length}` });
    more.addEventListener("click", () => { for (const node of nodes) node.hidden = false; more.parentNode.remove(); });
    list.append(make("li", {}, more));
  }
}

function drawQuery({ query, searches, clicked, nothing, items }) {
  const link = make("a", { textContent: "Search", href: `../#${new URLSearchParams({ q: query, ...(collection ? { in: collection } : {}) })}` });
  link.setAttribute("aria-label", `Search for ${query}`);
  const facts = `${ofSearches(searches)}, ${clicked ? `${number(clicked)} with a click (${percent(share(clicked, searches))})` : "none with a click"}${nothing ? `, nothing fits in ${number(nothing)}` : ""} · `;
  return make("li", {}, make("strong", { textContent: query, dir: "auto" }), make("p", {}, facts, link), make("div", { className: "pictures" }, ...items.map(drawPicture)));
}

function drawPicture(id, i) {
  const image = make("img", { alt: `Result ${i + 1}: ${id}`, title: id, loading: "lazy", width: 64, height: 64 });
  showThumbnail(image, base(), id, SIDES);
  return image;
}

function drawVersions(versions) {
  const ks = [1, 5, 10].filter((k) => versions.some(({ recall }) => recall[k] !== undefined));
  const rows = versions.map(({ version, created, count, change, recall, searches, clicked }, i) => {
    const gains = ks.map((k) => {
      const before = versions[i + 1]?.recall[k], value = recall[k];
      const cell = make("td", { textContent: value === undefined ? "–" : `${(100 * value).toFixed(1)} %` });
      if (value !== undefined && before !== undefined) cell.append(make("small", { textContent: `${value < before ? "−" : "+"}${Math.abs(100 * (value - before)).toFixed(1)}` }));
      return cell;
    });
    const rate = searches ? percent(share(clicked, searches)) : "–";
    return [version, created.slice(0, 16).replace("T", " "), number(count), ...gains, number(searches), rate, make("td", { className: "texts", textContent: change })];
  });
  const heads = ["Version", "Published (UTC)", "Items", ...ks.map((k) => `R@${k}`), "Searches", "Clicked", make("th", { className: "texts", textContent: "What changed" })];
  $("versions").replaceChildren(...table("Versions of the index", heads, rows));
}

function draw(found) {
  const { days, positions, versions, worst, unmet, has_texts } = found;
  const sums = ["searches", "clicked", "nothing"].map((name) => days.reduce((sum, day) => sum + day[name], 0));
  const [searches, clicked, nothing] = sums;
  const totals = [["Searches", number(searches)], ["With a click", percent(share(clicked, searches))], ["Nothing fits", percent(share(nothing, searches))]];
  $("totals").replaceChildren(...totals.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  drawDays(days);
  drawPositions(positions);
  drawQueries($("worst"), worst);
  drawQueries($("unmet"), unmet);
  drawVersions(versions);
  $("no-texts").hidden = has_texts;
  $("where").hidden = found.collections.length < 2;
  $("collection").replaceChildren(...found.collections.map((name) => new Option(name, name, false, name === found.collection)));
  const notes = [`The last ${days.length === 1 ? "day" : `${days.length} days`} with searches of ${found.collection}.`];
  if (!days.length) notes.splice(0, 1, "No search has been logged yet.");
  if (searches && !clicked) notes.push("No click has been reported: send them to POST /feedback.");
  $("status").textContent = notes.join(" ");
  $("insights").hidden = false;
}

async function load() {
  $("error").hidden = $("key-form").hidden = true;
  const key = sessionStorage.getItem(KEY) ?? "";
  $("forget-key").hidden = !key;
  try {
    $("status").textContent = "Loading …";
    draw(await loadInsights(base(), key));
  } catch ({ message, status }) {
    $("status").textContent = "";
    $("insights").hidden = true;
    $("key-form").hidden = status !== 401;
    $("error").textContent = status === 401 ? "The service does not know this admin key." : message;
    $("error").hidden = status === 401 && !key;
    if (status === 401) $("key").focus();
  }
}

$("collection").addEventListener("change", () => {
  collection = $("collection").value;
  history.replaceState(null, "", `#${new URLSearchParams({ in: collection })}`);
  load();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  if ($("api-key").value.trim()) saveKey($("api-key").value.trim());
  $("key").value = $("api-key").value = "";
  load();
});
$("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  if (savedKey()) saveKey("");
  location.reload();
});
load();
