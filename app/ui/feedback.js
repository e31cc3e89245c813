// Reports what is seen, opened and judged, if the service collects it: its responses then have a `query_id`.

import { request, savedKey } from "./service.js";

const CLIENT = "dcar.client";
const SEEN_MS = 1000; // half of a card in view for this time counts as seen
const SEND_MS = 5000;
const MOST = 100; // events in a request

const waiting = []; // events
const watched = new Map(); // card -> {result, timer}
let sending = null;
let client = "";

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const card = watched.get(target);
    clearTimeout(card?.timer);
    if (card && isIntersecting) card.timer = setTimeout(() => see(target), SEEN_MS);
    else if (!target.isConnected) watched.delete(target);
  }
}, { threshold: 0.5 });

function see(card) {
  report(watched.get(card).result, "impression");
  observer.unobserve(card);
  watched.delete(card);
}

// Gives the results of a response what events need.
export function nameResults({ query_id, results }) {
  if (query_id) for (const result of results) result.query_id = query_id;
}

// Reports when a card is seen or opened.
export function watch(card, result) {
  if (!result.query_id) return;
  watched.set(card, { result });
  observer.observe(card);
  card.querySelector(".open").addEventListener("click", () => report(result, "click"));
}

export function report({ query_id, id }, action_name, more = {}) {
  waiting.push({ query_id, client_id: clientId(), action_name, object_id: id, ...more });
  sending ??= setTimeout(send, SEND_MS);
}

// Returns the name of this browser, which is made at its first use.
function clientId() {
  if (client) return client;
  const made = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  try {
    client = localStorage.getItem(CLIENT) ?? made;
    localStorage.setItem(CLIENT, client);
  } catch { // not allowed here
    client = made;
  }
  return client;
}

function send() {
  clearTimeout(sending);
  sending = null;
  while (waiting.length) {
    const body = JSON.stringify({ events: waiting.splice(0, MOST) });
    const headers = { "Content-Type": "application/json" };
    if (savedKey()) request("feedback", { method: "POST", body, headers, keepalive: true }).catch(() => {}); // a beacon has no key
    else navigator.sendBeacon("feedback", body);
  }
}

addEventListener("visibilitychange", () => document.visibilityState === "hidden" && send());
