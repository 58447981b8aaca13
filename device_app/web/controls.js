// What viewers may change: boxes, figures on the picture, confidence, and the classes.
import { $, ask, fill, make, number, put, says } from "./tools.js";

const SEEN_MS = 60_000, FEW = 20, MATCHES = 40;
let waiting = null, changing = 0, shown = null, all = [], holding = false;
const seen = new Map();
// Rises with each change: an answer that was asked for before one must not undo it on the page.
export const changes = { number: 0 };

async function change(wanted) {
  changes.number++;
  changing++;
  try {
    const now = await ask("/api/controls", "POST", wanted);
    put("controls-says", "");
    changing--;
    changes.number++;
    showControls(now);
  } catch (error) {
    changing--;
    changes.number++;
    put("controls-says", says(error));
  }
}

export function showControls(c) {
  if (!c || changing) return;
  $("boxes").checked = c.boxes;
  $("figures").checked = !c.plain;
  if (waiting === null) { $("score").value = c.score_min; put("score-value", number(c.score_min, 2)); }
  shown = c.classes === null ? null : new Set(c.classes);
  draw();
}

export function takeSeen(names, agoMs = () => 0) {
  for (const name of names) seen.set(name, Date.now() - agoMs(name));
}

export function showClasses(classes) {
  all = classes && classes.length ? classes : [...seen.keys()].sort();
  draw();
}

const isShown = (name) => shown === null || shown.has(name);

function chosen() {
  const lately = all.filter((name) => Date.now() - (seen.get(name) ?? -Infinity) < SEEN_MS).sort();
  const rest = all.filter((name) => !lately.includes(name));
  if (all.length <= FEW) return [...lately, ...rest];
  const text = $("classes-search").value.trim().toLowerCase();
  if (text) return all.filter((name) => name.toLowerCase().includes(text)).slice(0, MATCHES);
  const special = shown === null ? [] : rest.filter((name) => isShown(name) === (shown.size <= all.length / 2));
  return [...lately, ...special].slice(0, MATCHES);
}

function draw() {
  $("classes-card").hidden = !all.length;
  $("classes-search").hidden = all.length <= FEW;
  const list = $("classes");
  // Chips that jump away from under a finger would be pressed by mistake.
  const names = holding ? [...list.children].map((li) => li.dataset.name).filter((name) => all.includes(name)) : chosen();
  fill(list, JSON.stringify(names), () => names.map((name) => {
    const li = make("li"), button = make("button", name, "tag");
    button.type = "button";
    li.dataset.name = name;
    button.addEventListener("click", () => toggle(name));
    li.append(button);
    return li;
  }));
  for (const li of list.children) li.firstChild.setAttribute("aria-pressed", String(isShown(li.dataset.name)));
  const drawn = all.filter(isShown).length;
  $("classes-all").setAttribute("aria-pressed", String(shown === null));
  $("classes-none").setAttribute("aria-pressed", String(shown !== null && !drawn));
  put("classes-says", shown !== null && !drawn ? "no boxes are drawn: choose a class" : shown !== null ? `${drawn} of ${all.length} classes are drawn` : all.length > names.length ? `all ${all.length} classes are drawn; listed are those of the last minute` : "");
}

function toggle(name) {
  const next = new Set(all.filter(isShown));
  if (!next.delete(name)) next.add(name);
  shown = next.size === all.length ? null : next;
  draw();
  change({ classes: shown === null ? null : [...next] });
}

$("classes").addEventListener("pointerenter", () => { holding = true; });
$("classes").addEventListener("pointerleave", () => { holding = false; });
$("classes-search").addEventListener("input", () => { holding = false; draw(); });
$("classes-all").addEventListener("click", () => change({ classes: null }));
$("classes-none").addEventListener("click", () => change({ classes: [] }));
$("boxes").addEventListener("change", (e) => change({ boxes: e.target.checked }));
$("figures").addEventListener("change", (e) => change({ plain: !e.target.checked }));
$("score").addEventListener("input", (e) => {
  const wanted = +e.target.value;
  put("score-value", number(wanted, 2));
  clearTimeout(waiting);
  waiting = setTimeout(() => { waiting = null; change({ score_min: wanted }); }, 80);
});
