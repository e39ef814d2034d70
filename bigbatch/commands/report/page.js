// The report's figures. Plain JavaScript, no library: charts as SVG from the JSON in the page.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
let axis = data.axes[0];

const MARGIN = { left: 58, right: 14, top: 8, bottom: 40 };
const SVG = "http://www.w3.org/2000/svg";

function make(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "\u2013";
  if (Math.abs(value) >= 1e6 && value % 1000 === 0 && digits <= 3) return value / 1e6 + "M";
  if (Number.isInteger(value) || Math.abs(value) >= 1e4) {
    return Math.round(value).toLocaleString("en-US").replace("-", "\u2212");
  }
  return String(Number(value.toPrecision(digits))).replace("-", "\u2212");
}

// A linear or logarithmic map from [low, high] to [from, to].
function scale(kind, low, high, from, to) {
  const f = kind === "log" ? Math.log10 : (value) => value;
  const span = f(high) - f(low) || 1;
  const map = (value) => from + ((f(value) - f(low)) / span) * (to - from);
  return Object.assign(map, { kind, low, high });
}

function ticks({ kind, low, high }, count) {
  const found = [];
  if (kind === "log") {
    const decades = Math.log10(high / low);
    const factors = decades > 4 ? [1] : decades > 1.7 ? [1, 3] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(decades / 7));
    const last = Math.ceil(Math.log10(high));
    for (let power = Math.floor(Math.log10(low)); power <= last; power += every) {
      for (const factor of factors) found.push(factor * 10 ** power);
    }
    const inside = found.filter((value) => value >= low && value <= high);
    if (inside.length > 1) return inside;
    found.length = 0;
  }
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// The series that can be seen, with the points that can be drawn on the axis that is shown.
function visible(chart) {
  const has = (name) => chart.series.some((series) => series.x[name]);
  const shown = has(axis) ? axis : data.axes.find(has);
  const series = chart.series
    .filter((one) => !hidden.has(one.experiment) && one.x[shown])
    .map((one) => {
      const points = [];
      one.x[shown].forEach((x, i) => {
        const y = one.y[i];
        if (x === null || y === null || (chart.scale === "log" && y <= 0)) return;
        points.push({ x, y, low: one.low ? one.low[i] : null, high: one.high ? one.high[i] : null });
      });
      return { ...one, points };
    })
    .filter((one) => one.points.length);
  return { shown, series };
}

function extent(chart, series) {
  let [low, high] = [Infinity, -Infinity];
  for (const { points } of series) {
    for (const { y, low: below, high: above } of points) {
      const least = below !== null && (chart.scale !== "log" || below > 0) ? below : y;
      low = Math.min(low, y, chart.scale === "log" ? Math.max(least, y / 10) : least);
      high = Math.max(high, y, above === null ? y : above);
    }
  }
  for (const [below, above] of chart.bands || []) {
    [low, high] = [Math.min(low, below), Math.max(high, above)];
  }
  if (chart.limits) return chart.limits;
  if (chart.scale === "log") return low < high ? [low / 1.08, high * 1.08] : [low / 2, high * 2];
  if (chart.id === "throughput") low = 0;
  const margin = 0.05 * (high - low) || Math.abs(high) || 1;
  return [low === 0 ? 0 : low - margin, high + margin];
}

function draw(chart, box) {
  const width = Math.max(260, box.clientWidth), height = Math.round(Math.min(340, 150 + 0.36 * width));
  const { shown, series } = visible(chart);
  box.querySelector("svg")?.remove();
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${chart.title}, by ${shown}`);
  box.prepend(svg);
  if (!series.length) {
    make(svg, "text", { x: width / 2, y: height / 2, class: "empty" }, "every experiment is hidden");
    return;
  }
  const last = Math.max(...series.flatMap(({ points }) => points[points.length - 1].x));
  const [low, high] = extent(chart, series);
  const x = scale("linear", 0, last || 1, MARGIN.left, width - MARGIN.right);
  const y = scale(chart.scale, low, high, height - MARGIN.bottom, MARGIN.top);
  const clip = `clip-${chart.id}`;
  make(make(svg, "clipPath", { id: clip }), "rect", {
    x: MARGIN.left, y: 0, width: width - MARGIN.left, height: height - MARGIN.bottom + 1,
  });
  for (const value of ticks(y, 5)) {
    make(svg, "line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value), class: "grid" });
    make(svg, "text", { x: MARGIN.left - 7, y: y(value) + 4, class: "y" }, number(value, 3));
  }
  for (const value of ticks(x, width < 420 ? 4 : 6)) {
    make(svg, "line", { x1: x(value), x2: x(value), y1: MARGIN.top, y2: height - MARGIN.bottom, class: "grid" });
    make(svg, "text", { x: x(value), y: height - MARGIN.bottom + 16, class: "x" }, number(value, 3));
  }
  make(svg, "text", { x: (MARGIN.left + width) / 2, y: height - 5, class: "x name" }, shown);
  const plot = make(svg, "g", { "clip-path": `url(#${clip})` });
  for (const [below, above] of chart.bands || []) {
    make(plot, "rect", { x: MARGIN.left, width: width - MARGIN.left, y: y(above), height: y(below) - y(above), class: "band" });
  }
  const floor = (value) => (chart.scale === "log" ? Math.max(value, low / 10) : value);
  for (const { experiment, points, thin } of series) {
    const { colour, dashed, width: stroke } = data.experiments[experiment];
    const banded = points.filter((point) => point.low !== null && point.high !== null);
    if (banded.length > 1) {
      const up = banded.map((p) => `${x(p.x).toFixed(1)},${y(floor(p.high)).toFixed(1)}`);
      const down = banded.map((p) => `${x(p.x).toFixed(1)},${y(floor(p.low)).toFixed(1)}`).reverse();
      make(plot, "polygon", { points: [...up, ...down].join(" "), fill: colour, opacity: 0.16 });
    }
    let path = "";
    points.forEach((p, i) => {
      const [px, py] = [x(p.x).toFixed(1), y(p.y).toFixed(1)];
      path += i === 0 ? `M${px},${py}` : chart.steps || thin ? `V${py}H${px}` : `L${px},${py}`;
    });
    make(plot, "path", {
      d: path, fill: "none", stroke: colour, "stroke-linejoin": "round",
      "stroke-width": thin ? 1.2 : stroke, "stroke-dasharray": dashed ? "7 4" : thin ? "2 3" : "none",
    });
    const end = points[points.length - 1];
    if (!thin) make(plot, "circle", { cx: x(end.x), cy: y(end.y), r: 2 + stroke / 2, fill: colour });
  }
  hover(chart, box, svg, plot, series, shown, x, y, width, height);
}

// The point at or before x where values hold, else the nearest.
function pointAt(points, at, steps) {
  let [from, to] = [0, points.length - 1];
  while (to - from > 1) {
    const middle = (from + to) >> 1;
    if (points[middle].x <= at) from = middle;
    else to = middle;
  }
  if (at <= points[from].x) return points[from];
  if (steps) return points[to];
  return at - points[from].x <= points[to].x - at ? points[from] : points[to];
}

function hover(chart, box, svg, plot, series, shown, x, y, width, height) {
  const marks = make(plot, "g", { class: "marks" });
  const tip = box.querySelector(".tip");
  const leave = () => {
    marks.replaceChildren();
    tip.hidden = true;
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const px = ((event.clientX - bounds.left) / bounds.width) * width;
    const at = Math.min(x.high, Math.max(0, ((px - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * x.high));
    leave();
    make(marks, "line", { x1: x(at), x2: x(at), y1: MARGIN.top, y2: height - MARGIN.bottom, class: "cursor" });
    const head = document.createElement("b");
    head.textContent = `${shown} ${number(at)}`;
    tip.replaceChildren(head);
    for (const { experiment, points, label } of series) {
      if (at > points[points.length - 1].x * 1.02) continue;
      const point = pointAt(points, at, chart.steps);
      const { name, colour } = data.experiments[experiment];
      make(marks, "circle", { cx: chart.steps ? x(at) : x(point.x), cy: y(point.y), r: 4, fill: colour });
      const row = document.createElement("span");
      const spread = point.low === null ? "" : ` (${number(point.low)} to ${number(point.high)})`;
      row.textContent = `${name}${label ? ", " + label : ""}: ${number(point.y)}${spread}`;
      row.style.borderColor = colour;
      tip.append(row);
    }
    tip.hidden = false;
    const right = px > width / 2;
    tip.style.left = right ? "auto" : `${Math.min(px + 14, width - 150)}px`;
    tip.style.right = right ? `${Math.max(width - px + 14, 0)}px` : "auto";
  });
}

const boxes = data.charts
  .map((chart) => [chart, document.getElementById(`chart-${chart.id}`)])
  .filter(([, box]) => box);

function drawAll() {
  for (const [chart, box] of boxes) draw(chart, box);
}

for (const choice of document.querySelectorAll("input[name=axis]")) {
  choice.addEventListener("change", () => {
    axis = choice.value;
    drawAll();
  });
}
for (const button of document.querySelectorAll("button[data-experiment]")) {
  button.addEventListener("click", () => {
    const experiment = Number(button.dataset.experiment);
    if (!hidden.delete(experiment)) hidden.add(experiment);
    button.setAttribute("aria-pressed", String(!hidden.has(experiment)));
    drawAll();
  });
}
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(drawAll);
});
drawAll();
