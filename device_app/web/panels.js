// What the page shows of the figures: stages, accuracy, board, counts, zones, events, warnings.
import { $, byCount, fill, known, make, number, put } from "./tools.js";

const STAGES = ["capture", "preprocess", "inference", "postprocess", "track", "draw", "encode"];
const EVENTS_SHOWN = 60;

export function showStages(stages) {
  const names = [...STAGES, ...Object.keys(stages || {}).filter((s) => !STAGES.includes(s))].filter((s) => stages && stages[s]);
  const top = Math.max(1, ...names.map((s) => stages[s].p99 || 0));
  const box = $("stages");
  fill(box, names.join(), () => names.map((s) => {
    const row = make("div", "", "stage-row"), track = make("div", "", "track");
    track.append(make("i", "", "p99"), make("i", "", "p50"));
    row.append(make("span", s), track, make("span"));
    return row;
  }));
  names.forEach((s, k) => {
    const row = box.children[k], { p50, p99 } = stages[s];
    row.querySelector(".p50").style.width = (100 * p50) / top + "%";
    row.querySelector(".p99").style.width = (100 * p99) / top + "%";
    row.lastChild.textContent = `${number(p50)} · ${number(p99)}`;
  });
}

export function showAccuracy(a) {
  a = a || { kind: "none", text: "" };
  const labels = a.kind === "labels", agreement = a.kind === "agreement";
  put("accuracy-kind", labels ? "against the source's labels" : agreement ? "agreement with a reference model" : "");
  const value = labels ? a.ap50 : a.f1;
  put("accuracy-value", number(value));
  put("accuracy-unit", labels ? "AP50" : agreement ? "F1 at IoU 0.5" : "");
  const span = !labels && known(a.f1_low) && known(a.f1_high);
  put("accuracy-span", span ? `95 %: ${number(a.f1_low)}–${number(a.f1_high)}` : "");
  $("interval").hidden = !span;
  if (span) {
    $("interval-span").style.left = a.f1_low + "%";
    $("interval-span").style.width = Math.max(0, a.f1_high - a.f1_low) + "%";
    $("interval-dot").style.left = value + "%";
  }
  put("accuracy-text", a.text || "");
}

export function showBoard(board, mqtt) {
  const b = board || {};
  const facts = [
    ["CPU", known(b.cpu_percent) && `${number(b.cpu_percent, 0)} %`],
    ["memory", known(b.memory_mb) && `${number(b.memory_mb, 0)} MB`],
    ["temperature", known(b.temperature_c) && `${number(b.temperature_c, 0)} °C`],
    ["clock", known(b.clock_mhz) && `${number(b.clock_mhz, 0)} MHz`],
    ["MQTT", mqtt && mqtt.split(":")[0]],
  ].filter(([, value]) => value);
  $("board-card").hidden = !facts.length;
  fill($("board"), JSON.stringify(facts), () => facts.map(([name, value]) => {
    const li = make("li", name);
    li.append(make("b", value));
    return li;
  }));
  put("board-says", b.says || "");
}

export function showCounts(counts) {
  const items = byCount(counts);
  fill($("counts"), JSON.stringify(items), () => (items.length ? items.map(([name, n]) => make("li", `${n} × ${name}`)) : [make("li", "nothing above the threshold", "none")]));
}

export function showZones(zones) {
  const names = Object.keys(zones || {});
  $("zones-card").hidden = !names.length;
  fill($("zones"), JSON.stringify(zones || {}), () => names.map((name) => {
    const inside = byCount(zones[name]), li = make("li");
    li.append(make("b", name), make("span", inside.map(([what, n]) => `${n} × ${what}`).join(", ") || "empty", inside.length ? "" : "soft"));
    return li;
  }));
}

export function showWarnings(warnings, mqtt) {
  const lines = [...(warnings || []), ...(mqtt && mqtt !== "connected" ? [`MQTT: ${mqtt}`] : [])];
  fill($("warnings"), JSON.stringify(lines), () => lines.map((text) => make("li", text)));
}

const happened = { run: "", latest: 0, list: [] };
export const eventsAfter = (run) => (run === happened.run ? happened.latest : 0);

// Takes new events; returns their kinds.
export function takeEvents(found) {
  if (found.run !== happened.run) Object.assign(happened, { run: found.run, list: [] });
  happened.latest = found.latest;
  happened.list = [...found.events.reverse(), ...happened.list].slice(0, EVENTS_SHOWN);
  if (happened.list.length) {
    $("events").replaceChildren(...happened.list.map((event) => {
      const li = make("li"), time = make("time", new Date(event.time * 1000).toLocaleTimeString([], { hour12: false }));
      time.dateTime = new Date(event.time * 1000).toISOString();
      li.append(time, make("span", event.text), make("small", event.kind));
      return li;
    }));
  } else $("events").replaceChildren(make("li", "nothing yet", "none"));
  return new Set(found.events.map((event) => event.kind));
}

export function showBig(f) {
  const a = f.accuracy || {}, board = f.board || {}, inference = (f.stages_ms || {}).inference;
  const rows = [
    [number(f.inference_fps), "FPS"],
    [number(inference && inference.p50), "ms"],
    [number(a.kind === "labels" ? a.ap50 : a.f1), a.kind === "labels" ? "AP50" : "F1 agreement", a.kind && a.kind !== "none"],
    [number(board.temperature_c, 0), "°C", known(board.temperature_c)],
  ].filter(([, , shown = true]) => shown);
  const seen = byCount(f.detections).slice(0, 6).map(([name, n]) => `${n} × ${name}`).join("   ");
  fill($("big"), JSON.stringify([rows, seen]), () => [
    ...rows.map(([value, unit]) => { const p = make("p"); p.append(make("b", value), make("span", unit)); return p; }),
    make("p", seen, "seen-big"),
  ]);
}
