"use strict";
// Sorts the tables and draws the charts; without this script, the page still has its tables and text.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hidden = {}; // section id -> set of hidden entries
const state = {}; // chart id -> {axis, log}

const colorOf = (entry) => {
  const look = data.looks[entry];
  return look.color === null ? css("--ink") : look.color[dark.matches ? 1 : 0];
};
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

// --- tables -----------------------------------------------------------------------------------------------

function sortBy(button) {
  const heading = button.closest("th");
  const body = heading.closest("table").tBodies[0];
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const key = (row) => row.cells[heading.cellIndex].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // missing values are always last
    const numbers = Number(x) - Number(y);
    return (Number.isNaN(numbers) ? x.localeCompare(y) : numbers) * (ascending ? 1 : -1);
  };
  body.append(...[...body.rows].sort(compare));
}

for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sortBy(button));

// --- charts -----------------------------------------------------------------------------------------------

const hovering = (trace, name) => ({
  text: trace.hover, hovertemplate: trace.hover ? `<b>${name}</b><br>%{text}<extra></extra>` : undefined,
  hoverinfo: trace.hover ? undefined : "skip",
});

// role -> Plotly trace, without position and hover
const ROLES = {
  line: (t, color, look) => ({
    mode: t.markers ? "lines+markers" : "lines", line: { color: color, width: 2, dash: look.dash }, marker: { color: color, size: 5 },
  }),
  faint: (t, color) => ({ mode: "lines", line: { color: faded(color, 0.35), width: 1 } }),
  band: (t, color) => ({ mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: faded(color, 0.13) }),
  growth: (t, color) => ({
    mode: "markers", marker: { size: 9, color: css("--paper"), line: { color: color, width: 2 } },
  }),
  step: (t, color, look) => ({ mode: "lines", line: { color: color, width: 2, dash: look.dash, shape: "hv" } }),
  planned: () => ({ mode: "lines", line: { color: css("--ink"), width: 1.6, dash: "dash", shape: "hv" } }),
  measured: (t, color) => ({ mode: "lines", line: { color: faded(color, 0.22), width: 8 } }),
  area: (t) => ({ mode: "lines", line: { width: 0 }, fillcolor: t.color, stackgroup: "kinds" }),
  frontier: () => ({ mode: "lines", line: { color: faded(css("--muted"), 0.3), width: 7, shape: "hv" } }),
  rates: (t, color, look) => ({
    mode: "lines+markers", line: { color: color, width: 2, dash: look.dash },
    marker: { color: color, size: t.chosen.map((chosen) => (chosen ? 12 : 5)) },
  }),
  bars: (t) => ({
    type: "bar", width: 1, textposition: "none", marker: { color: t.color, line: { color: css("--paper"), width: 1 } },
  }),
  diverged: (t, color) => ({ mode: "markers", cliponaxis: false, marker: { color: color, size: 9, symbol: "x-thin", line: { color: color, width: 2 } } }),
  point: (t, color) => ({
    mode: "markers",
    marker: { color: color, size: 11, symbol: t.marker + (t.hollow ? "-open" : ""), line: { width: 2, color: color } },
    error_y: t.error && {
      type: "data", symmetric: false, array: [t.error[0]], arrayminus: [t.error[1]],
      color: faded(color, 0.6), thickness: 1.2, width: 0,
    },
  }),
};

const isOff = (chart, trace) => Boolean(trace.entry && hidden[chart.section]?.has(trace.entry));

function pointLabel(trace) {
  const { text, dx, dy, anchor, far } = trace.label;
  const color = colorOf(trace.entry);
  return {
    x: trace.x[0], y: trace.y[0], text, font: { color: color }, xanchor: anchor, yanchor: "middle", borderpad: 0,
    ...(far
      ? { ax: dx, ay: dy, showarrow: true, arrowhead: 0, arrowwidth: 0.8, arrowcolor: faded(color, 0.6), standoff: 6 }
      : { xshift: dx, yshift: -dy, showarrow: false }),
  };
}

function plotlyTrace(chart, trace, axis) {
  const known = trace.entry !== undefined;
  const name = known ? data.labels[trace.entry] : trace.name;
  let x = Array.isArray(trace.x) ? trace.x : trace.x[axis];
  let y = trace.y;
  if (trace.role === "band") {
    x = [...x, ...[...x].reverse()];
    y = [...trace.low, ...[...trace.high].reverse()];
  }
  const made = ROLES[trace.role](trace, known ? colorOf(trace.entry) : "#888888", known ? data.looks[trace.entry] : {});
  const result = { type: "scatter", ...hovering(trace, name), ...made, x, y, name, visible: !isOff(chart, trace), showlegend: false };
  if (trace.role === "area") result.showlegend = true;
  return result;
}

const narrow = () => innerWidth < 640;

function layout(chart, axis, log) {
  const grid = { gridcolor: css("--faint"), linecolor: css("--faint"), zeroline: false, automargin: true };
  const title = chart.x_titles ? chart.x_titles[axis] : chart.x_title;
  const xaxis = { ...grid, showgrid: chart.kind === "tradeoff", ticks: "outside", tickcolor: css("--faint"),
    title: { text: title, standoff: 10 }, nticks: narrow() ? 5 : 9 };
  const yaxis = { ...grid, title: { text: chart.y_title, standoff: 8 } };
  if (/tokens|FLOPs/.test(title)) xaxis.tickformat = "~s";
  if (log) Object.assign(xaxis, { type: "log", dtick: 1 });
  else if (chart.kind === "loss" || chart.kind === "memory") xaxis.rangemode = "tozero";
  if (chart.x_range) xaxis.range = [...chart.x_range];
  if (chart.y_range && !log) yaxis.range = [...chart.y_range];
  if (chart.y_from_zero) yaxis.rangemode = "tozero";
  if (chart.x_tick_labels) Object.assign(xaxis, { tickvals: chart.x_ticks, ticktext: chart.x_tick_labels });
  else if (chart.x_ticks) Object.assign(xaxis, { type: "log", tickvals: chart.x_ticks, ticktext: chart.x_ticks.map(String) });
  return {
    xaxis, yaxis, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    margin: { l: 56, r: 12, t: chart.traces.some((t) => t.role === "area") ? (narrow() ? 56 : 34) : 12, b: 48 }, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("--muted") },
    hoverlabel: { bgcolor: css("--wash"), bordercolor: css("--faint"), align: "left", font: { color: css("--ink") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    annotations: narrow() ? [] : chart.traces.filter((t) => t.label && !isOff(chart, t)).map(pointLabel), // otherwise the buttons name the entries
    shapes: chart.mark_zero
      ? [{ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", line: { color: css("--muted"), width: 1, dash: "dot" } }]
      : [],
  };
}

function draw(chart) {
  const { axis, log } = state[chart.id];
  const traces = chart.traces.map((trace) => plotlyTrace(chart, trace, axis));
  const config = { responsive: true, displaylogo: false, displayModeBar: false, plotlyServerURL: "" };
  return Plotly.react(chart.id, traces, layout(chart, axis, log), config);
}

function drawAll(charts) {
  // Draw one at a time, so that the page stays scrollable.
  charts.reduce((before, chart) => before.then(() => draw(chart)).then(() => new Promise(setTimeout)), Promise.resolve())
    .then(() => { document.documentElement.dataset.drawn = "yes"; });
}

// --- controls ---------------------------------------------------------------------------------------------

function sample(entry) {
  const dashes = { solid: "none", dash: "6 3", dot: "2 3" };
  return `<svg width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke="${colorOf(entry)}" ` +
    `stroke-width="2.5" stroke-dasharray="${dashes[data.looks[entry].dash]}"/></svg>`;
}

function paintChips() {
  for (const chip of document.querySelectorAll(".chips button")) {
    chip.querySelector("svg")?.remove();
    chip.insertAdjacentHTML("afterbegin", sample(chip.dataset.entry));
  }
}

for (const chip of document.querySelectorAll(".chips button")) {
  chip.addEventListener("click", () => {
    const section = chip.closest("section").id;
    hidden[section] ??= new Set();
    const shown = chip.getAttribute("aria-pressed") === "true";
    chip.setAttribute("aria-pressed", String(!shown));
    hidden[section][shown ? "add" : "delete"](chip.dataset.entry);
    drawAll(data.charts.filter((chart) => chart.section === section));
  });
}

for (const input of document.querySelectorAll(".tabs input")) {
  input.addEventListener("change", () => {
    const chart = data.charts.find((one) => one.id === input.dataset.chart);
    if (input.type === "radio") state[chart.id].axis = input.value;
    else state[chart.id].log = input.checked;
    draw(chart);
  });
}

for (const chart of data.charts) state[chart.id] = { axis: "tokens", log: false };
if (window.Plotly) {
  paintChips();
  drawAll(data.charts);
  dark.addEventListener("change", () => { paintChips(); drawAll(data.charts); });
}
