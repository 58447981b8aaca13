// The record button, and what was recorded.
import { $, ask, bytes, duration, fill, make, number, put, says } from "./tools.js";

let now = null, busy = false, on = null;

export function showRecording(r) {
  if (!r || busy) return;
  now = r;
  $("record").hidden = false;
  $("record").setAttribute("aria-pressed", String(r.on));
  $("record").title = r.on ? `Ends ${r.name || "the recording"}` : r.pre_roll_s ? `Begins with the ${number(r.pre_roll_s, 0)} seconds before` : "Begins a recording";
  put("record-text", r.on ? `Stop ${duration(r.seconds)}` : "Record");
  $("rec").hidden = !r.on;
  put("rec-time", duration(r.seconds));
  $("recordings-says").className = "note warn";
  put("recordings-says", r.error || "");
  if (on !== r.on) { on = r.on; refreshRecordings(); }
}

export async function refreshRecordings() {
  try { showList((await ask("/api/recordings")).recordings); } catch (error) { put("recordings-says", says(error)); }
}

function showList(list) {
  $("recordings-card").hidden = false;
  const rows = [...list].sort((a, b) => (b.time || 0) - (a.time || 0) || b.name.localeCompare(a.name));
  fill($("recordings"), JSON.stringify(rows), () => (rows.length ? rows.map(row) : [make("li", "nothing yet", "none")]));
}

function row(one) {
  const li = make("li"), link = make("a", one.name), button = make("button", "Delete", "button small");
  const when = one.time ? new Date(one.time * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short", hour12: false }) : "";
  const facts = [typeof one.seconds === "number" ? duration(one.seconds) : "", bytes(one.bytes), when].filter(Boolean).join(" · ");
  link.href = `/api/recordings/${encodeURIComponent(one.name)}`;
  link.download = one.name;
  button.type = "button";
  button.setAttribute("aria-label", `Delete ${one.name}`);
  let asked = null;
  button.addEventListener("click", async () => {
    if (asked === null) { // the second press does it
      button.textContent = "Sure?";
      button.setAttribute("aria-label", `Sure? Delete ${one.name}`);
      asked = setTimeout(() => { asked = null; button.textContent = "Delete"; button.setAttribute("aria-label", `Delete ${one.name}`); }, 4000);
      return;
    }
    clearTimeout(asked);
    try { await ask(link.getAttribute("href"), "DELETE"); } catch (error) { put("recordings-says", says(error)); }
    refreshRecordings();
  });
  const name = make("span", "", "two");
  name.append(link, make("span", facts, "soft"));
  li.append(name, button);
  return li;
}

$("record").addEventListener("click", async () => {
  if (busy || !now) return;
  busy = true;
  try { now = await ask("/api/recording", "POST", { on: !now.on }); put("controls-says", ""); } catch (error) { put("controls-says", says(error)); }
  busy = false;
  showRecording(now);
});
