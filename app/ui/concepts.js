// Names that people teach by examples: a dialog teaches one, the search field offers them after "@", a view sharpens one.
//
// - A name becomes a chip when it is chosen, or followed by a space. The view is shown while one name alone is searched.
// - What has the class "writes" is hidden unless the service lets this page write.

import { isOneConcept } from "./address.js";
import { number, percent, titleOf } from "./format.js";
import { changeConcept, clearImages, listConcepts, loadConcept, loadDoubts, showThumbnail } from "./service.js";

const SIDES = [192, 384];
const LAST = /(?:^|\s)@(\S*)$/; // the name at the end of a text
const FINISHED = /(?:^|\s)@(\S+)\s/;

const $ = (id) => document.getElementById(id);
const query = $("query"), doubts = $("doubts");
let page = null;
let known = { names: [], loading: null, isLoaded: false }; // of the collection `base`
let view = { key: "" }; // {key, base, concept}: the name that is searched alone

// base, state: return the path of the searched collection and the present state; go changes it. typed: searches for what the fields say.
export function prepareConcepts(given) {
  page = given;
  $("without").addEventListener("focus", () => loadNames());
  $("forget").addEventListener("click", () => attempt($("concept-facts"), async () => {
    if (!confirm(`Forget the name “${view.concept.name}”? Its images stay.`)) return;
    await changeConcept(view.base, view.concept.name);
    known.loading = null;
    page.go({ concepts: [] });
  }));
}

async function loadNames(base = page.base()) {
  if (known.base !== base || !known.loading) known = { base, names: [], isLoaded: false, loading: listConcepts(base).catch(() => []) };
  const mine = known;
  Object.assign(mine, { names: await mine.loading, isLoaded: true });
  $("known-names").replaceChildren(...mine.names.map((name) => new Option(`@${name}`)));
}

// Returns the names that begin like the one at the end of a text.
function namesLike(text) {
  const start = LAST.exec(text)?.[0].trim().normalize("NFC").toLowerCase();
  return known.names.filter((name) => start && `@${name}`.toLowerCase().startsWith(start));
}

// Returns the text to search for: without the name at its end while more of that has to be typed.
export function searchable(text) {
  const isUnfinished = !known.names.includes(LAST.exec(text)?.[1]) && (!known.isLoaded || namesLike(text).length > 0);
  return (isUnfinished ? text.replace(LAST, "") : text).trim();
}

// Makes a chip of a name that a space follows, and offers those that begin like the last one.
export async function offerNames() {
  if (query.value.includes("@")) await loadNames();
  else known.loading = null; // names that others teach meanwhile are loaded with the next "@"
  const [written, finished] = FINISHED.exec(query.value) ?? [];
  if (known.names.includes(finished)) {
    query.value = query.value.replace(written, " ").trimStart();
    page.go({ concepts: [...new Set([...page.state().concepts, finished])], q: searchable(query.value) });
  } else page.typed();
  $("names").replaceChildren(...namesLike(query.value).slice(0, 8).map((name) => {
    const choose = () => {
      query.value = query.value.replace(LAST, ` @${name} `);
      query.focus();
      offerNames();
    };
    return Object.assign(document.createElement("button"), { type: "button", textContent: `@${name}`, onclick: choose });
  }));
}

// Asks for a name, and adds images of a collection to its examples. done: called with the name once that is taught.
export function teach(ids, base, done) {
  const form = $("teach").querySelector("form");
  known.loading = null;
  loadNames(base);
  $("teach-title").textContent = `What ${ids.length === 1 ? "does this image" : `do these ${number(ids.length)} images`} show?`;
  form.onsubmit = (event) => {
    if (event.submitter?.value === "cancel") return;
    event.preventDefault();
    attempt($("teach-error"), async () => {
      const name = $("name").value.trim().replace(/^@/, "").replace(/\s+/g, "-").normalize("NFC");
      const old = known.names.includes(name) ? await loadConcept(base, name) : { ids: [], not_ids: [] };
      const kind = $("kind").value.trim() || old.kind, others = old.not_ids.filter((id) => !ids.includes(id));
      await changeConcept(base, name, { ids: [...new Set([...old.ids, ...ids])], not_ids: others, kind });
      $("teach").close();
      form.reset();
      known.loading = null;
      view = { key: "" }; // it may be the name that is shown
      done(name);
    });
  };
  $("teach").showModal();
}

// Shows the error of an action in an element, or asks for a key.
async function attempt(error, action) {
  error.textContent = "";
  await action().catch(({ message, status }) => {
    error.textContent = message;
    if (status !== 401) return;
    $("teach").close();
    $("key-form").hidden = false;
    $("key").focus();
  });
}

export async function drawConcept() {
  const [name] = isOneConcept(page.state()) ? page.state().concepts : [], base = page.base(), key = name ? base + name : "";
  if (key === view.key) return;
  const mine = (view = { key, base });
  $("concept").hidden = true;
  const concept = name && (await loadConcept(base, name).catch(() => null)); // the list shows the error
  if (concept && mine === view) draw(concept);
}

// Shows how many members a concept has, and asks about the images nearest to its cut-off.
async function draw(concept) {
  const { name, members, examples } = (view.concept = concept);
  $("concept-title").textContent = `@${name}`;
  $("concept-facts").textContent = `${number(members)} ${members === 1 ? "image" : "images"}, from ${number(examples)} ${examples === 1 ? "example" : "examples"}`;
  $("concept").hidden = false;
  const items = await loadDoubts(view.base, concept).catch(() => []), list = doubts.querySelector("ul"), hadFocus = doubts.contains(document.activeElement);
  if (concept !== view.concept) return;
  doubts.hidden = !items.length;
  clearImages(list);
  list.append(...items.map((item) => makeDoubt(item)));
  if (hadFocus) list.querySelector("button")?.focus();
}

function makeDoubt(item) {
  const node = $("doubt").content.cloneNode(true).firstElementChild, [open, yes, no] = node.querySelectorAll("button"), title = titleOf(item);
  const answer = (field) => attempt($("concept-facts"), async () => {
    node.nextElementSibling?.querySelector("button").focus();
    node.remove();
    const asked = (view.concept = { ...view.concept, [field]: [...view.concept[field], item.id] }), saved = await changeConcept(view.base, asked.name, asked);
    if (asked !== view.concept) return; // another answer followed
    page.go({}, { replace: true, isNew: true });
    draw(saved);
  });
  showThumbnail(node.querySelector("img"), view.base, item.id, SIDES);
  Object.assign(open, { title: `${title}, ${percent(item.score)}`, ariaLabel: `Open ${title}`, onclick: () => page.go({ show: item.id }) });
  Object.assign(yes, { ariaLabel: `Yes, ${title}`, onclick: () => answer("ids") });
  Object.assign(no, { ariaLabel: `No, ${title}`, onclick: () => answer("not_ids") });
  return node;
}
