// The report's figures, drawn by Bokeh from the JSON in the page: each one anew when a choice changes.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
Bokeh.logger.set_level("error");
const { Models, Plotting, Range1d, ColumnDataSource } = Bokeh;
const byId = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("button[data-experiment]")];
const hidden = new Set();
const scales = Object.fromEntries(data.charts.map((chart) => [chart.id, chart.scale]));
const drawn = {};
let axis = data.axes[0];
let seeds = false;
const dark = matchMedia("(prefers-color-scheme: dark)");
let paper = false;

// A colour of the page's own style sheet: light, dark or on paper.
const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();

// On a dark page a dark colour is mixed with white, the more the darker it is.
function visibly(given) {
  if (paper || !dark.matches) return given;
  const parts = [1, 3, 5].map((at) => parseInt(given.slice(at, at + 2), 16) / 255);
  const light = parts.reduce((sum, part, i) => sum + part ** 2.2 * [0.21, 0.72, 0.07][i], 0);
  const white = Math.max(0, 0.8 - 6 * light);
  return `rgb(${parts.map((part) => Math.round(255 * (part + (1 - part) * white))).join(",")})`;
}

const tidy = (value) =>
  value === null ? "\u2013" : Number(value.toPrecision(5)).toLocaleString("en-US", { maximumSignificantDigits: 5 });

// The points of a series on one axis, without those that cannot be drawn.
function points(series, shown, chart) {
  const columns = { x: [], y: [], low: [], high: [], text: [] };
  const log = scales[chart.id] === "log";
  data.grids[series.grid][shown].forEach((x, i) => {
    const y = series.y[i];
    if (x === null || y === null || (log && y <= 0)) return;
    const [low, high] = series.low ? [series.low[i], series.high[i]] : [null, null];
    const stepped = (chart.steps || series.thin) && columns.y.length;
    // A value holds from the record before to its own.
    if (stepped) columns.x.push(columns.x[columns.x.length - 1]), columns.y.push(y);
    columns.x.push(x);
    columns.y.push(y);
    const spread = low === null ? "" : ` (${tidy(low)} to ${tidy(high)})`;
    const text = `${tidy(y)}${spread} at ${tidy(x)} ${shown}`;
    for (let n = stepped ? 2 : 1; n; n--) {
      columns.text.push(text);
      columns.low.push(low === null ? NaN : log ? Math.max(low, y / 10) : low);
      columns.high.push(high === null ? NaN : high);
    }
  });
  return columns;
}

function draw(chart) {
  const box = byId(`chart-${chart.id}`);
  const has = (name) => chart.series.some((series) => data.grids[series.grid][name]);
  const shown = has(axis) ? axis : data.axes.find(has);
  const visible = chart.series.filter(
    (one) => !hidden.has(one.experiment) && (seeds || !one.seed) && data.grids[one.grid][shown],
  );
  const figure = Plotting.figure({
    height: paper ? 230 : 320,
    sizing_mode: "stretch_width",
    x_axis_label: shown,
    y_axis_type: scales[chart.id],
    output_backend: "svg",
    tools: [],
    toolbar_location: paper ? null : "above",
    background_fill_alpha: 0,
    border_fill_alpha: 0,
    outline_line_alpha: 0,
  });
  const touch = matchMedia("(pointer: coarse)").matches;
  const box_zoom = new Models.BoxZoomTool({ dimensions: "width" });
  const wheel = new Models.WheelZoomTool({ dimensions: "width", modifiers: touch ? {} : { ctrl: true } });
  const tools = [box_zoom, wheel, new Models.PanTool({ dimensions: "width" })];
  tools.push(new Models.SaveTool({ filename: chart.id }), new Models.ResetTool());
  figure.add_tools(...tools);
  figure.toolbar.active_drag = touch ? null : box_zoom;
  figure.toolbar.active_scroll = wheel;
  figure.toolbar.logo = null;
  for (const [bottom, top] of chart.bands || []) {
    figure.add_layout(new Models.BoxAnnotation({ bottom, top, fill_color: "#8a8a8a", fill_alpha: 0.18, line_alpha: 0 }));
  }
  let last = 0;
  for (const series of visible) {
    const { name, colour: given, dash, width } = data.experiments[series.experiment];
    const line_color = visibly(given);
    const columns = points(series, shown, chart);
    if (!columns.x.length) continue;
    last = Math.max(last, columns.x[columns.x.length - 1]);
    const source = new ColumnDataSource({ data: columns });
    const field = (of) => ({ field: of });
    if (series.low) {
      figure.varea(field("x"), field("low"), field("high"), { source, fill_color: line_color, fill_alpha: 0.16 });
    }
    const thin = series.thin || series.seed !== undefined;
    const line = figure.line(field("x"), field("y"), {
      source, line_color, line_width: thin ? 1.2 : width, line_alpha: series.seed === undefined ? 1 : 0.55,
      line_dash: series.thin ? [1, 3] : dash,
    });
    const label = [name, series.label, series.seed].filter((part) => part !== undefined).join(", ");
    const tip = document.createElement("div");
    tip.innerHTML = `<b style="color:${line_color}">\u25a0</b> <span></span>: @text`;
    tip.querySelector("span").textContent = label.replaceAll("@", "@\u200b").replaceAll("$", "$\u200b");
    figure.add_tools(new Models.HoverTool({
      renderers: [line], mode: "vline", line_policy: "nearest", tooltips: tip.outerHTML, visible: false,
    }));
  }
  const limits = chart.limits && scales[chart.id] === "linear" ? chart.limits : null;
  if (limits) figure.y_range = new Range1d({ start: limits[0], end: limits[1], bounds: null });
  figure.x_range = new Range1d({ start: 0, end: last || 1, bounds: [0, last || 1] });
  for (const each of [...figure.below, ...figure.left]) {
    each.axis_label_text_color = each.major_label_text_color = colour("--soft");
    each.axis_line_color = each.major_tick_line_color = colour("--soft");
    each.minor_tick_line_color = null;
  }
  for (const each of figure.center) if (each instanceof Models.Grid) each.grid_line_color = colour("--line");
  box.setAttribute("aria-label", `${chart.title}, by ${shown}${visible.length ? "" : ": every experiment is hidden"}`);
  box.replaceChildren();
  drawn[chart.id] = { figure, last, view: Plotting.show(figure, box) };
}

// Arrows move along, plus and minus zoom, 0 shows all.
function keys(event, { figure, last }) {
  const { start, end } = figure.x_range;
  const width = end - start;
  const to = {
    ArrowLeft: [start - width / 10, end - width / 10],
    ArrowRight: [start + width / 10, end + width / 10],
    "+": [start + width / 5, end - width / 5],
    "-": [start - width / 3, end + width / 3],
    0: [0, last],
  }[event.key];
  if (!to || (event.key.startsWith("Arrow") && (to[0] < 0 || to[1] > last))) return;
  event.preventDefault();
  [figure.x_range.start, figure.x_range.end] = [Math.max(0, to[0]), Math.min(last, to[1])];
}

function drawAll() {
  document.body.classList.toggle("paper", paper);
  for (const button of buttons) {
    button.querySelector("line").setAttribute("stroke", visibly(data.experiments[button.dataset.experiment].colour));
  }
  data.charts.forEach(draw);
}

for (const chart of data.charts) {
  byId(`chart-${chart.id}`).addEventListener("keydown", (event) => keys(event, drawn[chart.id]));
  const positive = chart.series.every((series) => series.y.every((y) => y === null || y > 0));
  const button = byId(`scale-${chart.id}`);
  button.hidden = !positive;
  button.textContent = scales[chart.id];
  button.addEventListener("click", () => {
    button.textContent = scales[chart.id] = scales[chart.id] === "log" ? "linear" : "log";
    draw(chart);
  });
}
for (const choice of document.querySelectorAll("input[name=axis]")) {
  choice.addEventListener("change", () => ((axis = choice.value), drawAll()));
}
byId("seeds")?.addEventListener("change", (event) => ((seeds = event.target.checked), drawAll()));
function show(button, shown) {
  const experiment = Number(button.dataset.experiment);
  if (shown) hidden.delete(experiment);
  else hidden.add(experiment);
  button.setAttribute("aria-pressed", String(shown));
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    show(button, hidden.has(Number(button.dataset.experiment)));
    drawAll();
  });
}
byId("filter")?.addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const button of buttons) show(button, button.textContent.toLowerCase().includes(wanted));
  drawAll();
});
dark.addEventListener("change", drawAll);
addEventListener("beforeprint", () => ((paper = true), drawAll()));
addEventListener("afterprint", () => ((paper = false), drawAll()));
drawAll();
