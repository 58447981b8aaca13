"use strict";
const $ = (id) => document.getElementById(id);
const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
const number = (v, digits = 1) => (typeof v === "number" && isFinite(v) ? v.toFixed(digits) : "–");
const STAGES = ["capture", "preprocess", "inference", "postprocess", "track", "draw", "encode"];

// The picture: one endless MJPEG answer, taken apart here, so that the page knows when a picture
// came, shows only the newest, and asks again when they stop.
const HEAD_MAX = 1024;
let lastPicture = Date.now(), lastTry = 0, painted = false, watching = null, painting = false, next = null;

function paint(jpeg) {
  lastPicture = Date.now();
  if (painting) { next = jpeg; return; }
  painting = true;
  createImageBitmap(jpeg).then((bitmap) => {
    const canvas = $("live");
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) { canvas.width = bitmap.width; canvas.height = bitmap.height; }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    painted = true;
  }).catch(() => {}).finally(() => {
    painting = false;
    const jpeg = next;
    next = null;
    if (jpeg) paint(jpeg);
  });
}

function takePictures(bytes) {
  for (;;) {
    const head = new TextDecoder("latin1").decode(bytes.subarray(0, HEAD_MAX)), end = head.indexOf("\r\n\r\n");
    const length = /content-length: *(\d+)/i.exec(head.slice(0, Math.max(0, end)));
    if (!length) { if (bytes.length > HEAD_MAX) throw new Error("not a stream of pictures"); return bytes; }
    const from = end + 4, to = from + +length[1];
    if (bytes.length < to) return bytes;
    paint(new Blob([bytes.subarray(from, to)], { type: "image/jpeg" }));
    bytes = bytes.subarray(to);
  }
}

async function connect() {
  if (watching) watching.abort();
  const mine = (watching = new AbortController());
  lastTry = Date.now();
  fetch("/api/controls").then((r) => r.json()).then(showControls).catch(() => {});
  try {
    const answer = await fetch("/stream", { cache: "no-store", signal: mine.signal });
    const reader = answer.body.getReader();
    let bytes = new Uint8Array(0);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const all = new Uint8Array(bytes.length + value.length);
      all.set(bytes); all.set(value, bytes.length);
      bytes = takePictures(all);
    }
  } catch { /* told below, and by refresh() */ }
  if (mine === watching && !mine.signal.aborted) setTimeout(() => { if (mine === watching) connect(); }, 1500);
}
// A page that nobody sees costs the board nothing.
document.addEventListener("visibilitychange", () => { if (document.hidden) { if (watching) watching.abort(); } else { lastPicture = Date.now(); connect(); } });

function state(text, kind) { put("state", text); $("state").className = "chip state " + kind; }

function showStages(stages) {
  const names = STAGES.filter((s) => stages && stages[s]);
  const top = Math.max(1, ...names.map((s) => stages[s].p99));
  const box = $("stages");
  if (box.dataset.names !== names.join()) {
    box.dataset.names = names.join();
    box.replaceChildren(...names.map((s) => {
      const row = document.createElement("div");
      row.className = "stage-row";
      row.innerHTML = '<span></span><div class="track"><i class="p99"></i><i class="p50"></i></div><span></span>';
      row.firstChild.textContent = s;
      return row;
    }));
  }
  names.forEach((s, k) => {
    const row = box.children[k], { p50, p99 } = stages[s];
    row.querySelector(".p50").style.width = (100 * p50) / top + "%";
    row.querySelector(".p99").style.width = (100 * p99) / top + "%";
    row.lastChild.textContent = `${number(p50)} · ${number(p99)}`;
  });
}

function showAccuracy(a) {
  a = a || { kind: "none", text: "" };
  const labels = a.kind === "labels", agreement = a.kind === "agreement";
  put("accuracy-kind", labels ? "against the source's labels" : agreement ? "agreement with a reference model" : "");
  const value = labels ? a.ap50 : a.f1;
  put("accuracy-value", number(value));
  put("accuracy-unit", labels ? "AP50" : agreement ? "F1 at IoU 0.5" : "");
  const span = !labels && typeof a.f1_low === "number" && typeof a.f1_high === "number";
  $("interval").hidden = !span;
  if (span) {
    $("interval-span").style.left = a.f1_low + "%";
    $("interval-span").style.width = Math.max(0, a.f1_high - a.f1_low) + "%";
    $("interval-dot").style.left = value + "%";
  }
  put("accuracy-text", a.text || "");
}

function showBoard(board, latency) {
  const b = board || {};
  const facts = [
    ["latency", latency && `${number(latency.p50, 0)} · ${number(latency.p99, 0)} ms`],
    ["CPU", typeof b.cpu_percent === "number" && `${number(b.cpu_percent, 0)} %`],
    ["memory", typeof b.memory_mb === "number" && `${number(b.memory_mb, 0)} MB`],
    ["temperature", typeof b.temperature_c === "number" && `${number(b.temperature_c, 0)} °C`],
    ["clock", typeof b.clock_mhz === "number" && `${number(b.clock_mhz, 0)} MHz`],
  ].filter(([, value]) => value);
  $("board-card").hidden = !facts.length;
  $("board").replaceChildren(...facts.map(([name, value]) => {
    const li = document.createElement("li"), b = document.createElement("b");
    li.textContent = name;
    b.textContent = value;
    li.append(b);
    return li;
  }));
  put("board-says", b.says || "");
}

function showCounts(counts) {
  const items = Object.entries(counts || {}).sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
  $("counts").replaceChildren(...(items.length ? items : [["nothing above the threshold", 0]]).map(([name, n]) => {
    const li = document.createElement("li");
    li.textContent = n ? `${n} × ${name}` : name;
    if (!n) li.className = "none";
    return li;
  }));
}

async function refresh() {
  try {
    const f = await (await fetch("/api/figures", { cache: "no-store" })).json();
    put("model", f.model || ""); put("source", f.source || "");
    put("capture-fps", number(f.capture_fps)); put("inference-fps", number(f.inference_fps)); put("display-fps", number(f.display_fps));
    put("frames", String(f.frames ?? 0)); put("dropped", String(f.dropped ?? 0));
    put("elapsed", f.elapsed_s ? Math.round(f.elapsed_s) + " s" : "");
    showStages(f.stages_ms); showAccuracy(f.accuracy); showCounts(f.detections); showBoard(f.board, f.latency_ms);
    const patience = Math.max(4000, 4000 / (f.inference_fps || 1));
    const s = f.source_state || "running";
    if (s === "ended") state("source ended", "bad");
    else if (s !== "running") { state(s, "bad"); put("veil", "source " + s); }
    else if (Date.now() - lastPicture > patience) {
      state("no new pictures", "bad");
      put("veil", "no new pictures; reconnecting");
      if (Date.now() - lastTry > patience) connect();
    } else if (painted) { state("live", "ok"); put("veil", ""); }
  } catch {
    state("not connected", "bad");
    put("veil", "edgesight does not answer; trying again");
  }
  setTimeout(refresh, 500);
}

let waiting = null;
async function change(wanted) {
  try {
    const answer = await fetch("/api/controls", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(wanted) });
    showControls(await answer.json());
  } catch { /* refresh() tells that the connection is lost */ }
}
function showControls(c) {
  if (typeof c.boxes === "boolean") $("boxes").checked = c.boxes;
  if (typeof c.score_min === "number" && waiting === null) { $("score").value = c.score_min; put("score-value", number(c.score_min, 2)); }
}
$("boxes").addEventListener("change", (e) => change({ boxes: e.target.checked }));
$("score").addEventListener("input", (e) => {
  const wanted = +e.target.value;
  put("score-value", number(wanted, 2));
  clearTimeout(waiting);
  waiting = setTimeout(() => { waiting = null; change({ score_min: wanted }); }, 80);
});

connect();
refresh();
