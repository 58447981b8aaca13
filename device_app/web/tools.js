// Small helpers of the live page.
export const $ = (id) => document.getElementById(id);
export const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
export const known = (v) => typeof v === "number" && isFinite(v);
export const number = (v, digits = 1) => (known(v) ? v.toFixed(digits) : "–");

export function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// Replaces a list only if something of it is new: what has the focus, or is pointed at, stays.
export function fill(list, key, rows) {
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...rows());
}

// An answer of the server that is no good, in its own words.
export class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

export async function ask(path, method = "GET", body = undefined) {
  const options = { method, cache: "no-store" };
  if (body !== undefined) { options.body = JSON.stringify(body); options.headers = { "content-type": "application/json" }; }
  const answer = await fetch(path, options);
  if (answer.status === 204) return null;
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, found.error || `edgesight answers ${answer.status}`);
  return found;
}

export const says = (error) => (error instanceof Refused ? error.message : "edgesight does not answer; try again");

export function bytes(n) {
  if (!known(n)) return "";
  return n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`;
}

export function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds)), pad = (n) => String(n).padStart(2, "0");
  return s < 3600 ? `${Math.floor(s / 60)}:${pad(s % 60)}` : `${Math.floor(s / 3600)}:${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
}

export const byCount = (counts) => Object.entries(counts || {}).filter(([, n]) => n).sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
