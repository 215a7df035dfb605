// Line and area charts: hover and zoom are shared by all charts of a group, keys do what the pointer does, and every chart
// has a table to fall back on.
const Charts = (() => {
  const { el, svg, known, clamp, whole, colour, format, nearest, showTip, hideTip, tipRow, keepDrawn, redrawAll } = Base;
  const FEW = 25;  // up to here (evaluations, say) every point gets its dot, and smoothing would only mislead
  const DASHES = [null, "6 4", "2 3", "9 3 2 3"];
  let smoothing = 0;

  // What the charts of a stage share: the stretch of steps they show, and the step that is pointed at.
  class Span {
    constructor() { this.zoom = null; this.watchers = []; this.pointers = []; }
    set(zoom) { this.zoom = zoom; this.watchers.forEach((watch) => watch(zoom)); }
    point(step, from) { this.pointers.forEach((follow) => follow(step, from)); }
  }

  // ---- axes -------------------------------------------------------------------------------------------------------
  function tickLabel(value, percent) {
    const size = Math.abs(value);
    if (percent) return format(value, true);
    if (size >= 1e9 || (size < 1e-3 && size > 0)) return format(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return String(+value.toPrecision(5));
  }

  function ticks(low, high, wanted, integers = false) {
    const rough = Math.max((high - low) / wanted, integers ? 1 : Number.MIN_VALUE);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = (integers ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((f) => f * power).find((s) => s >= rough * 0.999) || power * 10;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
    return { step, values: found };
  }

  // {to: value -> 0…1, values: ticks} of an axis that starts and ends on a tick.
  function valueAxis(values, scale, wanted) {
    if (scale === "log") {
      const positive = values.filter((v) => v > 0);
      if (positive.length) return logAxis(Math.min(...positive), Math.max(...positive), wanted);
    }
    let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    if (scale === "percent" && high > 0.3) [low, high] = [Math.min(0, low), 1];
    else if (high - low < 0.004 * Math.abs(high) || high === low) {  // noise in the last digits is no curve
      const pad = high === low ? Math.abs(high) * 0.5 || 1 : Math.abs(high) * 0.01;
      [low, high] = [low - pad, high + pad];
    }
    if (low > 0 && low < 0.4 * high) low = 0;
    const { step } = ticks(low, high, wanted);
    const [from, to] = [Math.floor(low / step + 1e-9), Math.ceil(high / step - 1e-9)];
    const span = (to - from) * step;
    return { to: (value) => (value - from * step) / span, values: Array.from({ length: to - from + 1 }, (_, i) => (from + i) * step) };
  }

  function logAxis(least, most, wanted) {
    const low = Math.floor(Math.log10(least) + 1e-9), high = Math.max(low + 1, Math.ceil(Math.log10(most) - 1e-9));
    const every = Math.ceil((high - low) / (wanted + 1));
    const values = Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((_, i) => i % every === 0).map((power) => 10 ** power);
    return { to: (value) => (Math.log10(value) - low) / (high - low), values };
  }

  function smoothed(values) {
    if (!smoothing || values.length <= FEW) return values;
    let sum = 0, weight = 0;  // debiased exponential average: the first points are not pulled to zero
    return values.map((value) => {
      if (value === null) return null;
      sum = smoothing * sum + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  }

  // ---- a chart ----------------------------------------------------------------------------------------------------
  // series: [{name, steps, values, tone?, dash?}]; scale: linear, log, percent; kind: lines or stack.
  // unit, naming: what the places of the x axis are (steps, say, or layers), and what each is called.
  function chart(host, { series, label, span = new Span(), scale = "linear", kind = "lines", height = 190, legend = true, marker = null, unit = "step", naming = (at) => `${unit} ${whole(at)}` }) {
    const state = { series, label, span, scale, kind, height, marker, unit, naming, at: null, draft: null };
    series.forEach((one, i) => { one.tone ??= colour(i); });
    const holder = el("div", { class: "chart", tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": describe(state), style: { "min-height": `${height}px` } });
    if (legend) host.append(legend === true ? legendOf(series, scale) : legend);
    host.append(holder);
    const redraw = keepDrawn(holder, (width) => draw(holder, state, width));
    span.watchers.push(redraw);
    span.pointers.push((step, from) => { if (from !== state) followPointer(state, step); });
    listen(holder, state);
    return { mark: (step) => { state.marker = step; redraw(); } };
  }

  const legendOf = (series, scale) => el("div", { class: "legend" }, series.map((one) =>
    el("span", { title: one.name }, one.dash ? el("i", { class: "dashed", style: { color: one.tone } }) : el("i", { style: { background: one.tone } }), one.name,
      el("b", {}, format(one.values.filter(known).slice(-1)[0], scale === "percent")))));

  function visible(state) {
    const [from, to] = state.span.zoom || [-Infinity, Infinity];
    return state.series.map((one) => {
      const drawn = smoothed(one.values);
      const inside = one.steps.map((step, i) => i).filter((i) => one.steps[i] >= from && one.steps[i] <= to);
      return { ...one, steps: inside.map((i) => one.steps[i]), raw: inside.map((i) => one.values[i]), values: inside.map((i) => drawn[i]), isSmooth: drawn !== one.values };
    });
  }

  // Shares of a whole, each series on top of the ones before it; steps are those of the first series.
  function stacked(series) {
    const base = series[0].steps.map(() => 0);
    return series.map((one) => {
      const at = new Map(one.steps.map((step, i) => [step, one.values[i] ?? 0]));
      const low = [...base];
      series[0].steps.forEach((step, i) => { base[i] += at.get(step) ?? 0; });
      return { ...one, steps: series[0].steps, raw: one.raw, low, values: [...base] };
    });
  }

  function draw(holder, state, width) {
    const shown = state.kind === "stack" ? stacked(visible(state)) : visible(state);
    const steps = [...new Set(shown.flatMap((one) => one.steps))].sort((a, b) => a - b);
    if (!steps.length) { holder.replaceChildren(el("p", { class: "empty" }, "No values in these steps.")); state.steps = []; return; }
    const values = shown.flatMap((one) => (one.isSmooth && state.kind !== "stack" ? one.raw : one.values)).filter(known);
    const axis = valueAxis(state.kind === "stack" ? [0, ...values] : values, state.scale, state.height < 150 ? 2 : 4);
    const left = 12 + Math.max(...axis.values.map((v) => tickLabel(v, state.scale === "percent").length)) * 6.4;
    const box = { left, right: width - 12, top: 8, bottom: state.height - 22 };
    let [first, last] = state.span.zoom || [steps[0], steps[steps.length - 1]];
    if (first === last) [first, last] = [first - 1, last + 1];
    const x = (step) => box.left + ((step - first) / (last - first)) * (box.right - box.left);
    const y = (value) => box.bottom - clamp(axis.to(value), -0.02, 1.02) * (box.bottom - box.top);
    const root = svg("svg", { viewBox: `0 0 ${width} ${state.height}`, height: state.height, "aria-hidden": "true" });
    root.append(axes(box, x, y, axis.values, ticks(first, last, Math.max(2, width / 90), true).values, state.scale === "percent"));
    if (known(state.marker)) root.append(svg("line", { class: "here", x1: x(state.marker), x2: x(state.marker), y1: box.top, y2: box.bottom }));
    shown.forEach((one) => root.append(...(state.kind === "stack" ? [area(one, x, y)] : curve(one, x, y, state.scale))));
    const layer = svg("g", { visibility: "hidden" }), brush = svg("rect", { class: "brush", y: box.top, height: box.bottom - box.top, visibility: "hidden" });
    root.append(brush, layer);
    holder.replaceChildren(root);
    Object.assign(state, { steps, shown, x, y, box, first, last, root, layer, brush });
  }

  function axes(box, x, y, yTicks, xTicks, percent) {
    const group = svg("g", {});
    for (const value of yTicks) {
      group.append(svg("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
      group.append(svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickLabel(value, percent)));
    }
    for (const value of xTicks) {
      const text = tickLabel(value), overhang = x(value) + text.length * 3.3 > box.right + 12;
      group.append(svg("text", { x: overhang ? box.right + 12 : x(value), y: box.bottom + 17, "text-anchor": overhang ? "end" : "middle" }, text));
    }
    return group;
  }

  function pathOf(steps, values, x, y, log) {
    let pen = "M", path = "";
    values.forEach((value, i) => {
      if (value === null || (log && value <= 0)) { pen = "M"; return; }
      path += `${pen}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return path;
  }

  function curve(one, x, y, scale) {
    const log = scale === "log", marks = [];
    if (one.isSmooth) marks.push(svg("path", { class: "raw", d: pathOf(one.steps, one.raw, x, y, log), style: { stroke: one.tone } }));
    marks.push(svg("path", { class: "line", "data-series": one.name, d: pathOf(one.steps, one.values, x, y, log), "stroke-dasharray": one.dash, style: { stroke: one.tone } }));
    if (one.values.length <= FEW) {
      one.values.forEach((value, i) => {
        if (value !== null && !(log && value <= 0)) marks.push(svg("circle", { class: "dot", cx: x(one.steps[i]), cy: y(value), r: 3, style: { fill: one.tone } }));
      });
    }
    return marks;
  }

  function area(one, x, y) {
    const top = one.steps.map((step, i) => `${x(step).toFixed(1)} ${y(one.values[i]).toFixed(1)}`);
    const bottom = one.steps.map((step, i) => `${x(step).toFixed(1)} ${y(one.low[i]).toFixed(1)}`).reverse();
    return svg("path", { class: "area", "data-series": one.name, d: `M${[...top, ...bottom].join("L")}Z`, style: { fill: one.tone, stroke: one.tone } });
  }

  function describe({ series, label, scale, unit }) {
    const parts = series.map((one) => {
      const values = one.values.filter(known);
      return values.length ? `${one.name} from ${format(values[0], scale === "percent")} at ${unit} ${one.steps[0]} to ${format(values[values.length - 1], scale === "percent")} at ${unit} ${one.steps[one.steps.length - 1]}`
        : `${one.name} without values`;
    });
    return `${label}: ${parts.join("; ")}. Left and right read values, plus and minus zoom, Escape shows all.`;
  }

  // ---- pointer and keys -------------------------------------------------------------------------------------------
  function listen(holder, state) {
    const stepAt = (event) => {
      const offset = event.clientX - holder.getBoundingClientRect().left;
      const share = clamp((offset - state.box.left) / (state.box.right - state.box.left), 0, 1);
      return state.first + share * (state.last - state.first);
    };
    holder.addEventListener("pointerdown", (event) => {
      if (event.button || !state.steps?.length) return;
      state.draft = stepAt(event);
      holder.setPointerCapture(event.pointerId);
    });
    holder.addEventListener("pointermove", (event) => {
      if (!state.steps?.length) return;
      point(holder, state, nearest(state.steps, stepAt(event)), event.clientY);
      if (state.draft !== null) showBrush(state, state.draft, stepAt(event));
    });
    holder.addEventListener("pointerup", (event) => {
      const from = state.draft;
      state.draft = null;
      if (from === null) return;
      state.brush.setAttribute("visibility", "hidden");
      const [a, b] = [from, stepAt(event)].sort((p, q) => p - q);
      if (state.x(b) - state.x(a) > 6 && b - a >= 1) zoom(state, a, b);
    });
    holder.addEventListener("dblclick", () => state.span.set(null));
    for (const name of ["pointerleave", "blur"]) holder.addEventListener(name, () => { if (state.draft === null) { hideTip(); state.span.point(null); } });
    holder.addEventListener("keydown", (event) => onKey(holder, state, event));
  }

  function onKey(holder, state, event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !state.steps?.length) return;
    const last = state.steps.length - 1, at = state.at ?? last;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: last };
    if (event.key in moves) point(holder, state, clamp(moves[event.key], 0, last));
    else if (event.key === "+" || event.key === "=") {
      const quarter = (state.last - state.first) / 4, middle = state.steps[at];
      if (quarter >= 0.5) zoom(state, Math.max(state.first, middle - quarter), Math.min(state.last, middle + quarter));
    } else if (event.key === "-") {
      const half = (state.last - state.first) / 2;
      zoom(state, state.first - half, state.last + half);
    } else if (event.key === "Escape" || event.key === "0") { hideTip(); state.span.set(null); } else return;
    event.preventDefault();
  }

  // Stretches beyond the ends are cut; the whole is no zoom.
  function zoom(state, from, to) {
    const all = state.series.flatMap((one) => [one.steps[0], one.steps[one.steps.length - 1]]).filter(known);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const cut = [Math.max(low, Math.round(from)), Math.min(high, Math.round(to))];
    if (cut[1] > cut[0]) state.span.set(cut[0] === low && cut[1] === high ? null : cut);
  }

  function showBrush(state, a, b) {
    const [from, to] = [state.x(Math.min(a, b)), state.x(Math.max(a, b))];
    for (const [name, value] of [["x", from], ["width", to - from], ["visibility", "visible"]]) state.brush.setAttribute(name, value);
  }

  function point(holder, state, index, clientY) {
    state.at = index;
    const step = state.steps[index], place = holder.getBoundingClientRect();
    const rows = state.shown.map((one) => {
      if (!one.steps.length) return null;
      const near = nearest(one.steps, step);
      const value = state.kind === "stack" ? one.values[near] - one.low[near] : one.raw[near];
      return tipRow(one.tone, one.name + (one.steps[near] === step ? "" : ` (${state.unit} ${one.steps[near]})`), format(value, state.scale === "percent"));
    });
    followPointer(state, step);
    state.span.point(step, state);
    showTip(place.left + state.x(step), clientY ?? place.top + 30, el("div", { class: "muted" }, state.naming(step)), rows);
  }

  // The line at a step and the dots on the curves there.
  function followPointer(state, step) {
    if (!state.layer) return;
    state.layer.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null || step < state.first || step > state.last) { state.layer.setAttribute("visibility", "hidden"); return; }
    const marks = state.shown.filter((one) => one.steps.length).map((one) => {
      const near = nearest(one.steps, step), value = one.values[near];
      return known(value) && !(state.scale === "log" && value <= 0) ? svg("circle", { class: "dot", cx: state.x(one.steps[near]), cy: state.y(value), r: 3.6, style: { fill: one.tone } }) : "";
    });
    state.layer.replaceChildren(svg("line", { class: "cross", x1: state.x(step), x2: state.x(step), y1: state.box.top, y2: state.box.bottom }), ...marks);
  }

  // ---- a chart in a card ------------------------------------------------------------------------------------------
  const TABLE_ROWS = 60;

  function card({ title, note, ...options }) {
    const table = el("div", { class: "scroll fallback", hidden: true });
    const button = el("button", { type: "button", class: "quiet", "aria-expanded": "false", "aria-label": `${title} as a table` }, "table");
    const box = el("section", { class: "card chart-card", "aria-label": title }, el("header", {}, el("h3", {}, title), note ? el("span", { class: "muted small" }, note) : null, button));
    button.addEventListener("click", () => {
      table.hidden = !table.hidden;
      button.setAttribute("aria-expanded", String(!table.hidden));
      if (!table.hidden) table.replaceChildren(asTable(title, options));
    });
    chart(box, { label: title, ...options });
    box.append(table);
    return box;
  }

  function asTable(title, { series, scale, span, unit = "step", naming = unit === "step" ? whole : (at) => `${unit} ${at}` }) {
    const [from, to] = span?.zoom || [-Infinity, Infinity];
    const all = [...new Set(series.flatMap((one) => one.steps))].filter((step) => step >= from && step <= to).sort((a, b) => a - b);
    const every = Math.ceil(all.length / TABLE_ROWS), steps = all.filter((_, i) => i % every === 0 || i === all.length - 1);
    const columns = series.map((one) => new Map(one.steps.map((step, i) => [step, one.values[i]])));
    const caption = every > 1 ? `${title}, every ${every}th of ${whole(all.length)} ${unit}s` : title;
    return el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, el("th", { scope: "col" }, unit), series.map((one) => el("th", { scope: "col", class: "num" }, one.name)))),
      el("tbody", {}, steps.map((step) => el("tr", {}, el("th", { scope: "row" }, naming(step)), columns.map((column) => el("td", { class: "num" }, column.has(step) ? format(column.get(step), scale === "percent") : ""))))));
  }

  // A curve without axes, for a line of text.
  function spark({ steps, values }, tone = colour(0), [width, height] = [96, 24]) {
    const finite = values.filter(known);
    if (finite.length < 2) return null;
    const low = Math.min(...finite), high = Math.max(...finite), first = steps[0], last = steps[steps.length - 1];
    const x = (step) => 1 + ((step - first) / (last - first || 1)) * (width - 5), y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
    const end = values.reduce((at, value, i) => (known(value) ? i : at), 0);
    return svg("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
      svg("path", { class: "line", d: pathOf(steps, values, x, y), style: { stroke: tone } }),
      svg("circle", { cx: x(steps[end]), cy: y(values[end]), r: 2.4, style: { fill: tone } }));
  }

  return { Span, DASHES, chart, card, spark, smooth: (amount) => { smoothing = amount; redrawAll(); } };
})();
