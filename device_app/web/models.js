// The model choice: which runs, which could, and new ones by drop or file field.
import { $, ask, bytes, fill, make, put, says } from "./tools.js";

const RESTING_MS = 5000, BUSY_MS = 700;
let state = null, sending = false, due = 0, asking = false;

export async function refreshModels(force = false) {
  if (asking || (!force && Date.now() < due)) return;
  asking = true;
  try { show(await ask("/api/models")); } catch (error) { put("models-says", says(error)); }
  asking = false;
  due = Date.now() + (state && state.busy ? BUSY_MS : RESTING_MS);
}

function show(found) {
  state = found;
  $("model-card").hidden = false;
  fill($("models"), JSON.stringify([found.models, found.busy]), () => found.models.map((model) => {
    const li = make("li"), button = make("button", model.current ? "running" : model.name === found.busy ? "checking" : "use", "button small");
    button.type = "button";
    button.disabled = model.current || found.busy !== null;
    button.setAttribute("aria-label", `${model.current ? "Running" : "Use"}: ${model.name}`);
    button.addEventListener("click", () => choose(model.name));
    li.className = model.current ? "current" : "";
    li.append(make("b", model.name), make("span", bytes(model.bytes), "soft"), button);
    return li;
  }));
  const note = $("models-says");
  note.className = found.busy === null && found.error ? "note warn" : "note";
  put("models-says", found.busy !== null ? `${found.busy}: ${found.phase || "checking"}…` : found.error || "");
  $("drop").hidden = !found.uploads;
  if (!sending && !found.uploads && found.uploads_refused) put("upload-says", found.uploads_refused.replace(/^.*; /, ""));
}

async function choose(name) {
  try { show(await ask("/api/model", "POST", { name })); due = Date.now() + BUSY_MS; } catch (error) { refused("models-says", says(error)); due = Date.now() + RESTING_MS; }
}

function refused(id, text) { $(id).className = "note warn"; put(id, text); }

function send(file) {
  if (!file) return;
  if (sending) return refused("upload-says", "expected one file at a time, found another under way; wait for it");
  if (state && file.size > state.bytes_max) return refused("upload-says", `expected a model of at most ${bytes(state.bytes_max)}, found ${bytes(file.size)}; send a smaller one`);
  // Not fetch: that tells nothing of how far it is.
  const request = new XMLHttpRequest(), bar = $("upload-progress");
  const end = (text, bad) => { sending = false; bar.hidden = true; $("upload").value = ""; $("upload-says").className = bad ? "note warn" : "note"; put("upload-says", text); refreshModels(true); };
  sending = true;
  bar.hidden = false;
  bar.value = 0;
  $("upload-says").className = "note";
  put("upload-says", `sending ${file.name}`);
  request.upload.addEventListener("progress", (e) => {
    if (!e.lengthComputable) return;
    bar.value = e.loaded / e.total;
    put("upload-says", e.loaded < e.total ? `sending ${file.name}: ${Math.floor((100 * e.loaded) / e.total)} %` : `checking ${file.name}`);
  });
  request.addEventListener("load", () => {
    let found = {};
    try { found = JSON.parse(request.responseText); } catch { /* told below */ }
    if (request.status === 201) end(`${file.name} is here; choose it above`, false);
    else end(found.error || `edgesight answers ${request.status}`, true);
  });
  request.addEventListener("error", () => end("the connection was lost; try again", true));
  request.open("PUT", `/api/models/${encodeURIComponent(file.name)}`);
  request.send(file);
}

const drop = $("drop"), card = $("model-card");
$("upload").addEventListener("change", (e) => send(e.target.files[0]));
card.addEventListener("dragover", (e) => { e.preventDefault(); drop.classList.add("over-it"); });
card.addEventListener("dragleave", () => drop.classList.remove("over-it"));
card.addEventListener("drop", (e) => { e.preventDefault(); drop.classList.remove("over-it"); if (state && state.uploads) send(e.dataTransfer.files[0]); });
// A file that misses the card must not replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (e) => e.preventDefault());
