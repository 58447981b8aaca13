// Small plots over the last minutes: plain SVG, drawn once a second from rows that the server keeps.
import { $, known, make, number } from "./tools.js";

const WIDTH = 600, HEIGHT = 100, SPANS = [60, 120, 300, 600];
const svg = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const ago = (s) => (s < 1.5 ? "now" : s < 90 ? `${Math.round(s)} s ago` : `${Math.round(s / 60)} min ago`);

// Rows by column; `at` is when each was taken, on this browser's own clock.
export const past = { run: "", latest: 0, at: [], columns: {} };

export function takeRows(found, now) {
  const { run, latest, kept, age_s, interval_s, seen_s, ...columns } = found;
  if (run !== past.run) Object.assign(past, { run, at: [], columns: {} });
  past.latest = latest;
  past.at.push(...age_s.map((age) => now - age));
  const extra = Math.max(0, past.at.length - kept);
  past.at.splice(0, extra);
  for (const [name, values] of Object.entries(columns)) {
    const column = (past.columns[name] ||= []);
    column.push(...values);
    column.splice(0, extra);
  }
}

export class Plot {
  // lines: [column, what it is, unit]; the first is drawn in the accent, others quietly behind it.
  constructor(id, { lines, band = null, digits = 1, floor = null, ceiling = null, span = 1 }) {
    Object.assign(this, { lines, band, digits, floor, ceiling, span, host: $(id) });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = svg("path", { class: band ? "band" : "area" });
    this.paths = lines.map((_, i) => svg("path", { class: i ? "line other" : "line" }));
    this.cursor = svg("path", { class: "cursor" });
    this.svg.append(svg("path", { class: "grid", d: `M0 0H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT}H${WIDTH}` }), this.area, ...[...this.paths].reverse(), this.cursor);
    this.top = make("span", "", "top");
    this.bottom = make("span", "", "bottom");
    this.since = make("span", "", "since");
    this.value = make("span", "", "value");
    this.host.append(this.svg, this.top, this.bottom, this.since, this.value);
    this.pointed = null;
    const point = (event) => {
      const box = this.svg.getBoundingClientRect();
      this.pointed = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.tell();
    };
    this.host.addEventListener("pointermove", point);
    this.host.addEventListener("pointerdown", point);
    this.host.addEventListener("pointerleave", () => { this.pointed = null; this.tell(); });
  }

  draw(now) {
    const names = [...this.lines.map(([name]) => name), ...(this.band || [])];
    this.columns = Object.fromEntries(names.map((name) => [name, past.columns[name] || []]));
    const values = names.flatMap((name) => this.columns[name]).filter(known);
    this.host.hidden = !values.length;
    if (!values.length) return;
    const oldest = now - past.at[0];
    this.seconds = SPANS.find((s) => oldest <= s) || SPANS[SPANS.length - 1];
    this.now = now;
    let low = this.floor ?? Math.min(...values), high = Math.max(...values, low + this.span);
    const room = (high - low) * 0.08;
    high = Math.min(this.ceiling ?? Infinity, high + room);
    if (this.floor === null) low = Math.max(0, low - room);
    const x = (i) => WIDTH - ((now - past.at[i]) / this.seconds) * WIDTH;
    const y = (v) => HEIGHT - ((v - low) / (high - low)) * HEIGHT;
    this.lines.forEach(([name], i) => this.paths[i].setAttribute("d", line(this.columns[name], x, y)));
    this.area.setAttribute("d", this.band ? between(this.columns[this.band[0]], this.columns[this.band[1]], x, y) : under(this.columns[this.lines[0][0]], x, y));
    this.top.textContent = number(high, 0);
    this.bottom.textContent = number(low, 0);
    this.since.textContent = `${this.seconds / 60} min ago`;
    this.svg.setAttribute("aria-label", this.inWords());
    this.tell();
  }

  inWords() {
    return this.lines.map(([name, what, unit]) => {
      const values = this.columns[name].filter(known);
      if (!values.length) return `${what}: nothing known`;
      const [a, b, c] = [values[values.length - 1], Math.min(...values), Math.max(...values)].map((v) => number(v, this.digits));
      return `${what} in ${unit}: now ${a}, lowest ${b}, highest ${c}`;
    }).join("; ");
  }

  tell() {
    if (this.pointed === null || this.host.hidden) { this.value.textContent = "now"; this.value.className = "value"; this.cursor.setAttribute("d", ""); return; }
    const when = this.now - (1 - this.pointed) * this.seconds;
    let at = 0;
    for (let i = 1; i < past.at.length; i++) if (Math.abs(past.at[i] - when) < Math.abs(past.at[at] - when)) at = i;
    const told = this.lines.map(([name, what, unit], i) => known(this.columns[name][at]) ? `${i || this.lines.length > 1 ? what + " " : ""}${number(this.columns[name][at], this.digits)} ${unit}` : "").filter(Boolean);
    this.value.className = "value pointed";
    this.value.textContent = [...told, ago(this.now - past.at[at])].join(" · ");
    const x = WIDTH - ((this.now - past.at[at]) / this.seconds) * WIDTH;
    this.cursor.setAttribute("d", `M${x.toFixed(1)} 0V${HEIGHT}`);
  }
}

// Runs of known values as [first, last] indices: nothing is drawn where nothing was known.
function runs(values) {
  const found = [];
  values.forEach((v, i) => {
    if (!known(v)) return;
    if (i && known(values[i - 1])) found[found.length - 1][1] = i; else found.push([i, i]);
  });
  return found;
}
const points = (values, x, y, from, to) => {
  const found = [];
  for (let i = from; i <= to; i++) found.push(`${x(i).toFixed(1)} ${y(values[i]).toFixed(1)}`);
  return found;
};
const line = (values, x, y) => runs(values).map(([a, b]) => "M" + points(values, x, y, a, b).join("L") + (a === b ? "h1" : "")).join("");
const under = (values, x, y) => runs(values).map(([a, b]) => `M${x(a).toFixed(1)} ${HEIGHT}L${points(values, x, y, a, b).join("L")}L${x(b).toFixed(1)} ${HEIGHT}Z`).join("");
const between = (low, high, x, y) => runs(low.map((v, i) => (known(high[i]) ? v : null))).map(([a, b]) => `M${points(low, x, y, a, b).join("L")}L${points(high, x, y, a, b).reverse().join("L")}Z`).join("");
