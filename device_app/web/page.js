// The live page: asks for the figures twice a second and hands them to the panels.
import { changes, showClasses, showControls, takeSeen } from "./controls.js";
import { refreshModels } from "./models.js";
import { eventsAfter, showAccuracy, showBig, showBoard, showCounts, showStages, showWarnings, showZones, takeEvents } from "./panels.js";
import { connect, picture } from "./picture.js";
import { Plot, past, takeRows } from "./plots.js";
import { refreshRecordings, showRecording } from "./recording.js";
import { $, Refused, ask, number, put } from "./tools.js";

const plots = [
  new Plot("plot-fps", { lines: [["inference_fps", "speed", "FPS"]], floor: 0 }),
  new Plot("plot-ms", { lines: [["inference_ms", "inference", "ms"], ["latency_ms", "latency", "ms"]], floor: 0 }),
  new Plot("plot-accuracy", { lines: [["accuracy", "accuracy", "%"]], band: ["accuracy_low", "accuracy_high"], span: 10, ceiling: 100 }),
  new Plot("plot-temperature", { lines: [["temperature_c", "temperature", "°C"]], span: 10 }),
];
let rowsDue = 0, letIn = true;

function state(text, kind) { put("state", text); $("state").className = "chip state " + kind; }

function show(f) {
  put("model", f.model || ""); put("source", f.source || "");
  put("capture-fps", number(f.capture_fps)); put("inference-fps", number(f.inference_fps)); put("display-fps", number(f.display_fps));
  put("inference-ms", number(((f.stages_ms || {}).inference || {}).p50));
  put("latency", number((f.latency_ms || {}).p50, 0)); put("latency-p99", number((f.latency_ms || {}).p99, 0));
  put("frames", String(f.frames ?? 0)); put("dropped", String(f.dropped ?? 0));
  put("elapsed", f.elapsed_s ? Math.round(f.elapsed_s) + " s" : "");
  showStages(f.stages_ms); showAccuracy(f.accuracy); showCounts(f.detections); showBoard(f.board, f.mqtt);
  showZones(f.zones); showWarnings(f.warnings, f.mqtt); showBig(f);
  takeSeen(Object.keys(f.detections || {}));
  showClasses(f.classes);
}

function showState(f) {
  const patience = Math.max(4000, 4000 / (f.inference_fps || 1));
  const s = f.source_state || "running";
  if (s === "ended") state("source ended", "bad");
  else if (s !== "running") { state(s, "bad"); put("veil", "source " + s); }
  else if (Date.now() - picture.last > patience) {
    state("no new pictures", "bad");
    put("veil", "no new pictures; reconnecting");
    if (Date.now() - picture.asked > patience) connect();
  } else if (picture.painted) { state("live", "ok"); put("veil", ""); }
}

async function refreshRows(run) {
  if (Date.now() < rowsDue) return;
  rowsDue = Date.now() + 1000;
  const found = await ask(`/api/history?after=${run === past.run ? past.latest : 0}`);
  const now = performance.now() / 1000;
  takeRows(found, now);
  takeSeen(Object.keys(found.seen_s), (name) => 1000 * found.seen_s[name]);
  for (const plot of plots) plot.draw(now);
}

async function refresh() {
  let pause = 500;
  try {
    const before = changes.number;
    if (!document.hidden) {
      const f = await ask("/api/figures");
      if (!letIn) { letIn = true; connect(); }
      show(f);
      if (before === changes.number) showControls(f.controls);
      showState(f);
      if (f.parts.includes("recorder")) showRecording(f.recording);
      if (f.parts.includes("models")) refreshModels();
      await refreshRows(f.run);
      if (f.events !== eventsAfter(f.run)) {
        const kinds = takeEvents(await ask(`/api/events?after=${eventsAfter(f.run)}`));
        if (kinds.has("recording") && f.parts.includes("recorder")) refreshRecordings();
        if (kinds.has("model") && f.parts.includes("models")) refreshModels(true);
      }
    }
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      letIn = false;
      pause = 3000;
      state("new link needed", "bad");
      put("veil", "edgesight was started anew and asks for its new link: open the link or QR code that it printed");
    } else {
      state("not connected", "bad");
      put("veil", error instanceof Refused ? error.message : "edgesight does not answer; trying again");
    }
  }
  setTimeout(refresh, pause);
}

// Light or dark: as the system has it, until the viewer chooses the other one.
const dark = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
const showTheme = () => $("theme").setAttribute("aria-pressed", String(isDark()));
$("theme").addEventListener("click", () => {
  const wanted = isDark() ? "light" : "dark", systems = (wanted === "dark") === dark.matches;
  if (systems) delete root.dataset.theme; else root.dataset.theme = wanted;
  try { if (systems) localStorage.removeItem("theme"); else localStorage.setItem("theme", wanted); } catch { /* for this visit only */ }
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();

// Full screen with big figures; where a browser has no full screen, the page's own area.
function television(on) {
  document.body.classList.toggle("tv", on);
  for (const id of ["head", "controls", "seen", "tiles", "cards"]) $(id).inert = on;
  $("tv").setAttribute("aria-pressed", String(on));
}
$("tv").addEventListener("click", async () => {
  const on = !document.body.classList.contains("tv");
  television(on);
  try { if (on) await $("picture").requestFullscreen(); else if (document.fullscreenElement) await document.exitFullscreen(); } catch { /* the page's own area */ }
});
document.addEventListener("fullscreenchange", () => { if (!document.fullscreenElement) television(false); });
addEventListener("keydown", (e) => { if (e.key === "Escape" && !document.fullscreenElement) television(false); });

connect();
refresh();
