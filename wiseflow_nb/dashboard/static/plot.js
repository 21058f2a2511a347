const COLUMNS = 7;
const CHARTS = [
  { id: "cpu", title: "CPU", unit: "% of limit", band: "cpu", scale: 100, traces: [[0, "CPU", 1]] },
  { id: "memory", title: "Memory", unit: "% of limit", band: "memory", scale: 100, traces: [[1, "memory", 2]] },
  { id: "disk", title: "Disk", unit: "% used", band: "disk", scale: 100, traces: [[2, "disk", 3]] },
  { id: "io", title: "Disk I/O", unit: "MB/s", scale: 1e-6, traces: [[3, "read", 1], [4, "written", 4]] },
  { id: "network", title: "Network", unit: "MB/s", scale: 1e-6, traces: [[5, "received", 3], [6, "sent", 2]] },
];
// One line each: the default puts the date on a second line, which a small chart has no room for.
const TICKS = [
  { dtickrange: [null, 60000], value: "%H:%M:%S" },
  { dtickrange: [60000, 86400000], value: "%H:%M" },
  { dtickrange: [86400000, null], value: "%b %d" },
];
const CACHE = "wiseflow-plotly";

// -- the library, once a page ------------------------------------------------------------------

async function evaluate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = await new Response(stream).text();
  const module = { exports: {} };
  // A page with an AMD loader would catch the library otherwise.
  new Function("module", "exports", "define", code)(module, module.exports, undefined);
  return module.exports.newPlot ? module.exports : globalThis.Plotly;
}

function cacheKey(version) {
  return new URL(`/__wiseflow__/plotly-${encodeURIComponent(version)}.gz`, location.href).href;
}

async function cached(version) {
  try {
    const found = await (await caches.open(CACHE)).match(cacheKey(version));
    return found ? await found.arrayBuffer() : null;
  } catch {
    return null; // no caches on an insecure origin, or storage is refused
  }
}

async function remember(version, bytes) {
  try {
    const cache = await caches.open(CACHE);
    for (const old of await cache.keys()) if (old.url !== cacheKey(version)) await cache.delete(old);
    await cache.put(cacheKey(version), new Response(bytes));
  } catch {
    // the next page asks the kernel again
  }
}

function shared() {
  if (!globalThis.__wiseflowPlotly) {
    const state = { asked: false };
    state.promise = new Promise((resolve) => { state.resolve = resolve; });
    globalThis.__wiseflowPlotly = state;
  }
  return globalThis.__wiseflowPlotly;
}

async function obtain({ model }) {
  const state = shared();
  if (state.asked) return;
  state.asked = true;
  const version = model.get("plotly_version");
  const bytes = await cached(version);
  if (bytes) {
    try {
      state.resolve(await evaluate(bytes));
      return;
    } catch {
      // a damaged entry: ask the kernel
    }
  }
  const ask = () => { if (!state.done) model.send({ type: "plotly" }); };
  ask();
  // A kernel that is busy or lost the request is asked again.
  let wait = 8000;
  const again = () => setTimeout(() => { if (!state.done) { ask(); wait *= 2; again(); } }, wait);
  again();
}

// -- data --------------------------------------------------------------------------------------

function floats(view) {
  const buffer = view.buffer ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : view;
  return new Float64Array(buffer);
}

function zoned(seconds) {
  // Plotly draws epoch milliseconds as UTC; readers think in their own zone.
  const ms = seconds * 1000;
  return ms - new Date(ms).getTimezoneOffset() * 60000;
}

function split(buffer, n) {
  const all = floats(buffer);
  const times = new Float64Array(n);
  for (let i = 0; i < n; i += 1) times[i] = zoned(all[i]);
  const columns = [];
  for (let k = 0; k < COLUMNS; k += 1) columns.push(all.slice((k + 1) * n, (k + 2) * n));
  return { times, columns };
}

function join(a, b, from) {
  const out = new Float64Array(a.length - from + b.length);
  out.set(a.subarray(from));
  out.set(b, a.length - from);
  return out;
}

function message({ content, buffers, store, tell }) {
  const { data } = store;
  if (content.type === "plotly") {
    const state = shared();
    if (state.done) return;
    state.done = true;
    const bytes = new Uint8Array(buffers[0].buffer ? buffers[0].buffer.slice(buffers[0].byteOffset, buffers[0].byteOffset + buffers[0].byteLength) : buffers[0]);
    evaluate(bytes).then((library) => {
      state.resolve(library);
      remember(content.version, bytes);
    }, (error) => {
      state.done = false;
      store.parts.failed = `The chart library could not be loaded: ${error.message}`;
      tell({ type: "failed" });
    });
  } else if (content.type === "history") {
    const { times, columns } = split(buffers[0], content.n);
    Object.assign(data, { times, columns, epoch: content.epoch, range: content.range, end: content.end, at: Date.now() });
    tell({ type: "history" });
  } else if (content.type === "append" && content.epoch === data.epoch) {
    const { times, columns } = split(buffers[0], content.n);
    const begin = zoned(content.end - data.range);
    let from = 0;
    while (from < data.times.length && data.times[from] < begin) from += 1;
    data.times = join(data.times, times, from);
    data.columns = data.columns.map((column, k) => join(column, columns[k], from));
    data.end = content.end;
    data.at = Date.now();
    tell({ type: "append", times, columns });
  }
}

// -- colours -----------------------------------------------------------------------------------

const brush = (() => {
  let context = null;
  return (colour) => {
    context = context || Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return `rgba(${r},${g},${b},${(a / 255).toFixed(3)})`;
  };
})();

function palette(el) {
  const probe = h("span", { style: { display: "none" } });
  el.append(probe);
  const read = (name) => {
    probe.style.color = `var(${name})`;
    return brush(getComputedStyle(probe).color);
  };
  const found = {
    text: read("--wf-muted"), ink: read("--wf-text"), grid: read("--wf-grid"), panel: read("--wf-panel"), border: read("--wf-border"),
    warning: read("--wf-band-warning"), critical: read("--wf-band-critical"), warn: read("--wf-warning"), crit: read("--wf-critical"),
    cell: read("--wf-cell"),
    series: [1, 2, 3, 4].map((n) => read(`--wf-series-${n}`)),
    fill: [1, 2, 3, 4].map((n) => read(`--wf-fill-${n}`)),
  };
  probe.remove();
  return found;
}

// -- one chart ---------------------------------------------------------------------------------

function shapes(chart, store, colours, begin, end) {
  const out = [];
  const bands = (store.parts.bands || {})[chart.band];
  if (bands) {
    const band = (y0, y1, fillcolor) => ({ type: "rect", xref: "paper", x0: 0, x1: 1, y0, y1, fillcolor, line: { width: 0 }, layer: "below" });
    out.push(band(bands[0], bands[1], colours.warning), band(bands[1], 100, colours.critical));
  }
  const marks = store.parts.marks || { alerts: [], cells: [] };
  for (const [resource, severity, from, to] of marks.alerts) {
    if (resource !== chart.band) continue;
    const colour = severity === "critical" ? colours.crit : colours.warn;
    const x0 = Math.max(begin, zoned(from));
    const x1 = to === null ? end : Math.min(end, zoned(to));
    if (x1 < begin || x0 > end) continue;
    out.push({ type: "rect", yref: "paper", x0, x1, y0: 0.965, y1: 1, fillcolor: colour, opacity: 0.85, line: { width: 0 } });
    out.push({ type: "line", yref: "paper", x0, x1: x0, y0: 0, y1: 1, opacity: 0.7, line: { color: colour, width: 1, dash: "dot" } });
  }
  for (const [number, from, to, status] of marks.cells) {
    const x0 = Math.max(begin, zoned(from));
    const x1 = to === null ? end : Math.min(end, zoned(to));
    if (x1 < begin || x0 > end) continue;
    const bar = { type: "rect", yref: "paper", x0, x1, y0: 0, y1: 0.03, fillcolor: status === "error" ? colours.crit : colours.cell, opacity: 0.75, line: { width: 0 } };
    if (chart.band && (x1 - x0) / (end - begin) > 0.07) {
      bar.label = { text: `[${number}]`, textposition: "top left", yanchor: "bottom", font: { size: 10, color: colours.text }, padding: 1 };
    }
    out.push(bar);
  }
  return out;
}

function layout(chart, store, colours) {
  const { data } = store;
  const end = zoned(data.end);
  const begin = zoned(data.end - data.range);
  const axis = { gridcolor: colours.grid, linecolor: colours.grid, zeroline: false, tickfont: { size: 11, color: colours.text }, automargin: false };
  const percent = Boolean(chart.band);
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 38, r: 10, t: 8, b: 24 },
    font: { family: "system-ui, sans-serif", size: 11, color: colours.text },
    xaxis: { ...axis, type: "date", range: [begin, end], nticks: 5, showgrid: true, hoverformat: "%b %d %H:%M:%S", tickformatstops: TICKS },
    yaxis: percent
      ? { ...axis, range: [0, 100], tickvals: [0, 25, 50, 75, 100], fixedrange: true }
      : { ...axis, rangemode: "tozero", nticks: 5, autorangeoptions: { include: [0, 1] }, fixedrange: true },
    showlegend: false, hovermode: "x unified", dragmode: "zoom",
    hoverlabel: { bgcolor: colours.panel, bordercolor: colours.border, font: { color: colours.ink, size: 12 } },
    modebar: { remove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"], bgcolor: colours.panel, color: colours.text, activecolor: colours.ink },
    shapes: shapes(chart, store, colours, begin, end),
    uirevision: "keep",
  };
}

function lastFinite(column) {
  for (let i = column.length - 1; i >= 0 && i > column.length - 4; i -= 1) if (Number.isFinite(column[i])) return column[i];
  return NaN;
}

function scaled(column, scale) {
  const out = new Float64Array(column.length);
  for (let i = 0; i < column.length; i += 1) out[i] = column[i] * scale;
  return out;
}

function makeChart(chart, store) {
  const plot = h("div", { class: "wf-plot", "aria-hidden": "true" });
  const note = h("div", { class: "wf-plot-note wf-skeleton" });
  const figures = chart.traces.map(([, name, colour]) => {
    const value = h("b");
    const keys = chart.traces.length > 1 ? [h("i", { class: "wf-key", style: { background: `var(--wf-series-${colour})` } }), `${name} `] : [];
    return { value, node: h("span", { class: "wf-figure" }, ...keys, value) };
  });
  const root = h("section", { class: "wf-panel wf-chart", "data-testid": `chart-${chart.id}`, "data-points": 0, role: "img", "aria-label": `${chart.title}, ${chart.unit}` },
    h("div", { class: "wf-chart-head" }, h("h3", {}, chart.title, h("span", { class: "wf-muted", text: ` ${chart.unit}` })),
      h("div", { class: "wf-figures" }, ...figures.map((item) => item.node))),
    h("div", { class: "wf-plot-box" }, plot, note));
  let library = null;
  let drawn = false;
  let follow = true;
  let colours = null;
  let length = 0;

  function describe() {
    const { data } = store;
    const bands = (store.parts.bands || {})[chart.band];
    setAttr(root, "data-warning", bands ? bands[0] : null);
    setAttr(root, "data-critical", bands ? bands[1] : null);
    setAttr(root, "data-points", data.times ? data.times.length : 0);
    chart.traces.forEach(([k], index) => {
      const value = data.columns ? lastFinite(data.columns[k]) * chart.scale : NaN;
      setText(figures[index].value, Number.isFinite(value) ? `${value.toFixed(value < 9.95 ? 1 : 0)}${chart.band ? " %" : ""}` : data.times ? "n/a" : "");
    });
    const failed = store.parts.failed;
    const empty = data.times && !chart.traces.some(([k]) => data.columns[k].some(Number.isFinite));
    note.classList.toggle("wf-skeleton", !failed && !(empty && drawn) && !drawn);
    note.hidden = drawn && !empty && !failed;
    setText(note, failed || (empty && drawn ? "No readings in this range yet" : ""));
  }

  function draw() {
    const { data } = store;
    if (!library || !data.times || !root.isConnected || !plot.clientWidth) return;
    colours = palette(root);
    const traces = chart.traces.map(([k, name, colour]) => ({
      type: "scatter", mode: "lines", name, x: data.times, y: scaled(data.columns[k], chart.scale),
      line: { color: colours.series[colour - 1], width: 1.6 }, connectgaps: false,
      fill: chart.traces.length > 1 ? "none" : "tozeroy", fillcolor: colours.fill[colour - 1],
      hovertemplate: chart.band ? "%{y:.1f} %<extra></extra>" : `${name} %{y:.2f} MB/s<extra></extra>`,
    }));
    const wanted = layout(chart, store, colours);
    if (drawn && !follow) wanted.xaxis.range = plot.layout.xaxis.range;
    library.react(plot, traces, wanted, { displaylogo: false, responsive: false, displayModeBar: "hover", doubleClick: "reset" });
    length = data.times.length;
    if (!drawn) {
      drawn = true;
      plot.on("plotly_relayout", (change) => {
        if (change["xaxis.range[0]"] !== undefined) follow = false;
      });
      plot.on("plotly_doubleclick", () => { follow = true; draw(); });
    }
    describe();
  }

  function remark() {
    if (!drawn) return;
    const { data } = store;
    const begin = zoned(data.end - data.range);
    const end = zoned(data.end);
    plot.layout.shapes = shapes(chart, store, colours, begin, end);
    if (follow) {
      plot.layout.xaxis.range = [begin, end];
      plot.layout.xaxis.autorange = false;
    }
  }

  return {
    root, draw, describe,
    use(found) { library = found; draw(); },
    bands() {
      describe();
      if (!drawn) return;
      remark();
      library.relayout(plot, { shapes: plot.layout.shapes });
    },
    append({ times, columns }) {
      if (!drawn) return;
      remark();
      // What fell out of the range goes with the same call that brings the new points.
      length = store.data.times.length;
      const all = chart.traces.map((_, index) => index);
      library.extendTraces(plot, { x: all.map(() => times), y: chart.traces.map(([k]) => scaled(columns[k], chart.scale)) }, all, length);
      describe();
    },
    resize() { if (drawn && plot.clientWidth) library.Plots.resize(plot); else draw(); },
    close() { if (drawn) library.purge(plot); },
  };
}

export default wiseflow({
  message,
  asks: [obtain],
  view({ el, store }) {
    const charts = CHARTS.map((chart) => makeChart(chart, store));
    el.append(h("div", { class: "wf-charts" }, ...charts.map((chart) => chart.root)));
    const each = (act) => { for (const chart of charts) act(chart); };
    let closed = false;
    shared().promise.then((library) => {
      shared().done = true;
      if (!closed) each((chart) => chart.use(library));
    });
    let pending = 0;
    const later = (act) => {
      cancelAnimationFrame(pending);
      pending = requestAnimationFrame(() => { if (!closed) each(act); });
    };
    let width = 0;
    const sizes = new ResizeObserver(() => {
      if (el.clientWidth === width) return;
      width = el.clientWidth;
      later((chart) => chart.resize());
    });
    sizes.observe(el);
    const theme = new MutationObserver(() => setTimeout(() => later((chart) => chart.draw()), 60));
    const watched = { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name", "data-theme", "style"] };
    theme.observe(document.body, watched);
    theme.observe(document.documentElement, watched);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const onScheme = () => later((chart) => chart.draw());
    scheme.addEventListener("change", onScheme);
    return {
      update(what) {
        if (what.type === "history") each((chart) => chart.draw());
        else if (what.type === "append") each((chart) => chart.append(what));
        else if (what.type === "parts" && !what.first) each((chart) => chart.bands());
        each((chart) => chart.describe());
      },
      close() {
        closed = true;
        sizes.disconnect();
        theme.disconnect();
        scheme.removeEventListener("change", onScheme);
        each((chart) => chart.close());
      },
    };
  },
});
