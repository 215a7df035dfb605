"use strict";
// SVG charts of this report: line charts, bars and the expert-load heatmap. Model output reaches the page as text nodes only.
const Charts = (() => {
  const NAMESPACE = document.querySelector("svg").namespaceURI;
  const COLOURS = 6;
  const FEW = 25;  // up to here (evaluations, say) every point gets its dot, and smoothing would only mislead
  const redraws = [];
  let smoothing = 0;

  function el(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(NAMESPACE, tag), attributes, children);
  }

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "style") Object.assign(node.style, value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  const colour = (index) => `var(--s${index % COLOURS})`;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- numbers ----------------------------------------------------------------------------------------------------
  function format(value, percent = false) {
    if (value === null || value === undefined) return "–";
    if (percent) return `${+(value * 100).toFixed(1)}%`;
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(+value.toPrecision(4));
  }

  function tickLabel(value, percent) {
    const size = Math.abs(value);
    if (!percent && size >= 1e9) return format(value);
    if (!percent && size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (!percent && size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return percent ? format(value, true) : size < 1e-3 ? format(value) : String(+value.toPrecision(5));
  }

  function ticks(low, high, count, whole = false) {
    const rough = Math.max((high - low) / count, whole ? 1 : Number.MIN_VALUE);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = (whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((f) => f * power).find((s) => s >= rough * 0.999) || power * 10;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
    return { step, values: found };
  }

  // {low, high, values}: an axis that starts and ends on a tick.
  function yAxis(series, percent, count) {
    const values = series.flatMap((one) => one.values).filter((value) => value !== null);
    if (percent || !values.length) return { low: 0, high: 1, values: [0, 0.25, 0.5, 0.75, 1] };
    let [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
      const pad = Math.abs(high) * 0.5 || 1;
      [low, high] = [low - pad, high + pad];
    }
    if (low > 0 && low < 0.4 * high) low = 0;
    const { step } = ticks(low, high, count);
    const [from, to] = [Math.floor(low / step + 1e-9), Math.ceil(high / step - 1e-9)];
    return { low: from * step, high: to * step, values: Array.from({ length: to - from + 1 }, (_, i) => (from + i) * step) };
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

  // ---- tooltip ----------------------------------------------------------------------------------------------------
  function showTip(x, y, rows) {
    const tip = document.getElementById("tip");
    tip.replaceChildren(...rows);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${clamp(x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14, 4, innerWidth - box.width)}px`;
    tip.style.top = `${clamp(y - box.height - 12, 4, innerHeight - box.height)}px`;
  }

  const hideTip = () => { document.getElementById("tip").hidden = true; };

  function tipRow(swatch, name, value) {
    const label = el("span", {}, swatch ? el("i", { style: { background: swatch } }) : null, name);
    return el("div", { class: "row" }, label, el("b", {}, value));
  }

  // Draws now if there is room, and again whenever the width changes (also when a closed section opens).
  function keepDrawn(host, draw) {
    let width = 0;
    const redraw = (force) => {
      const now = Math.floor(host.clientWidth);
      if (now < 40 || (now === width && force !== true)) return;
      width = now;
      draw(now);
    };
    redraws.push(() => redraw(true));
    // Drawing inside the callback changes the size it reports on, which browsers raise as an error: wait for the next frame.
    new ResizeObserver(() => requestAnimationFrame(redraw)).observe(host);
    queueMicrotask(redraw);
  }

  // ---- line chart -------------------------------------------------------------------------------------------------
  function lineChart(host, { series, label, percent = false, height = 220, legend = series.length > 1 }) {
    const holder = el("div", { class: "chart" });
    if (legend) {
      host.append(el("div", { class: "legend" }, ...series.map((one, i) =>
        el("span", {}, el("i", { style: { background: colour(i) } }), one.name))));
    }
    host.append(holder);
    let marker = null, place = () => {};
    keepDrawn(holder, (width) => {
      place = drawLines(holder, { series, label, percent, height, width });
      if (marker !== null) place(marker);
    });
    return { mark: (step) => { marker = step; place(step); } };
  }

  function drawLines(holder, { series, label, percent, height, width }) {
    const { low, high, values: yTicks } = yAxis(series, percent, height < 160 ? 3 : 4);
    const left = 10 + Math.max(...yTicks.map((v) => tickLabel(v, percent).length)) * 6.6;
    const box = { left, right: width - 14, top: 8, bottom: height - 22 };
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    let first = steps[0], last = steps[steps.length - 1];
    if (first === last) [first, last] = [first - 1, last + 1];
    const x = (step) => box.left + ((step - first) / (last - first)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": describe(label, series, percent) });
    root.append(axes(box, x, y, yTicks, ticks(first, last, Math.max(2, width / 90), true).values, percent));
    const here = svg("line", { class: "here", y1: box.top, y2: box.bottom, visibility: "hidden" });
    root.append(here, ...series.flatMap((one, i) => curve(one, i, x, y)));
    addHover(root, { series, steps, x, y, box, percent });
    holder.replaceChildren(root);
    return (step) => {
      for (const [name, value] of [["x1", x(step)], ["x2", x(step)], ["visibility", "visible"]]) here.setAttribute(name, value);
    };
  }

  function axes(box, x, y, yTicks, xTicks, percent) {
    const group = svg("g", { "aria-hidden": "true" });
    for (const value of yTicks) {
      group.append(svg("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
      group.append(svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickLabel(value, percent)));
    }
    for (const value of xTicks) {
      group.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }));
      const text = tickLabel(value), overhang = x(value) + text.length * 3.3 > box.right + 14;
      group.append(svg("text", { x: overhang ? box.right + 14 : x(value), y: box.bottom + 17, "text-anchor": overhang ? "end" : "middle" }, text));
    }
    group.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    return group;
  }

  function pathOf(steps, values, x, y) {
    let pen = "M", path = "";
    values.forEach((value, i) => {
      if (value === null) { pen = "M"; return; }
      path += `${pen}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return path;
  }

  function curve(one, index, x, y) {
    const drawn = smoothed(one.values), marks = [];
    if (drawn !== one.values) marks.push(svg("path", { class: "raw", d: pathOf(one.steps, one.values, x, y), style: { stroke: colour(index) } }));
    marks.push(svg("path", { class: "line", "data-series": one.name, d: pathOf(one.steps, drawn, x, y), style: { stroke: colour(index) } }));
    if (drawn.length <= FEW) {
      drawn.forEach((value, i) => {
        if (value !== null) marks.push(svg("circle", { class: "dot", cx: x(one.steps[i]), cy: y(value), r: 3.2, style: { fill: colour(index) } }));
      });
    }
    return marks;
  }

  function describe(label, series, percent) {
    const parts = series.map((one) => {
      const values = one.values.filter((value) => value !== null);
      return values.length
        ? `${one.name} from ${format(values[0], percent)} at step ${one.steps[0]} to ${format(values[values.length - 1], percent)} at step ${one.steps[one.steps.length - 1]}`
        : `${one.name} without values`;
    });
    return `${label}: ${parts.join("; ")}. Arrow keys read values.`;
  }

  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle; else high = middle;
    }
    return value - sorted[low] <= sorted[high] - value ? low : high;
  }

  function addHover(root, { series, steps, x, y, box, percent }) {
    const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom });
    const layer = svg("g", { visibility: "hidden", "aria-hidden": "true" }, cross);
    root.append(layer);
    let at = steps.length - 1;
    const show = (index, clientY) => {
      at = clamp(index, 0, steps.length - 1);
      const rows = [el("div", { class: "muted" }, `step ${steps[at].toLocaleString("en-US")}`)];
      layer.replaceChildren(cross);
      cross.setAttribute("x1", x(steps[at]));
      cross.setAttribute("x2", x(steps[at]));
      series.forEach((one, i) => {
        const near = nearest(one.steps, steps[at]);
        const elsewhere = one.steps[near] === steps[at] ? "" : ` (step ${one.steps[near]})`;
        rows.push(tipRow(colour(i), one.name + elsewhere, format(one.values[near], percent)));
        if (one.values[near] !== null) layer.append(svg("circle", { class: "dot", cx: x(one.steps[near]), cy: y(one.values[near]), r: 4.2, style: { fill: colour(i) } }));
      });
      layer.setAttribute("visibility", "visible");
      const place = root.getBoundingClientRect();
      showTip(place.left + x(steps[at]), clientY ?? place.top + 30, rows);
    };
    const hide = () => { layer.setAttribute("visibility", "hidden"); hideTip(); };
    root.addEventListener("pointermove", (event) => {
      const offset = event.clientX - root.getBoundingClientRect().left;
      const [from, to] = [x(steps[0]), x(steps[steps.length - 1])];
      const share = to > from ? clamp((offset - from) / (to - from), 0, 1) : 0;
      show(nearest(steps, steps[0] + share * (steps[steps.length - 1] - steps[0])), event.clientY);
    });
    root.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move) { event.preventDefault(); show(at + move); }
    });
    for (const name of ["pointerleave", "blur"]) root.addEventListener(name, hide);
  }

  // ---- bars -------------------------------------------------------------------------------------------------------
  function barChart(host, { bars, label, height = 200 }) {
    const holder = el("div", { class: "chart" });
    host.append(holder);
    keepDrawn(holder, (width) => {
      const box = { left: 40, right: width - 6, top: 20, bottom: height - 22 };
      const y = (value) => box.bottom - value * (box.bottom - box.top);
      const slot = (box.right - box.left) / bars.length;
      const text = bars.map((bar) => `${bar.name} ${format(bar.value, true)}`).join(", ");
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${label}: ${text}` });
      root.append(axes(box, () => 0, y, [0, 0.25, 0.5, 0.75, 1], [], true));
      bars.forEach((bar, i) => {
        const wide = Math.min(56, slot * 0.62), middle = box.left + slot * (i + 0.5);
        root.append(svg("rect", {
          class: "bar", x: middle - wide / 2, width: wide, y: y(clamp(bar.value, 0, 1)), height: Math.max(1, box.bottom - y(clamp(bar.value, 0, 1))),
          rx: 4, style: { fill: bar.muted ? "var(--muted)" : "var(--s0)", opacity: bar.muted ? 0.5 : 1 },
        }));
        root.append(svg("text", { class: "strong", x: middle, y: y(clamp(bar.value, 0, 1)) - 6, "text-anchor": "middle" }, format(bar.value, true)));
        root.append(svg("text", { x: middle, y: box.bottom + 17, "text-anchor": "middle" }, bar.name));
      });
      holder.replaceChildren(root);
    });
  }

  // ---- heatmap ----------------------------------------------------------------------------------------------------
  // Colour says load x experts: 1 is an expert's fair share (neutral), half or less full blue, double or more full orange.
  function heatmap(host, { layers, experts }) {
    const holder = el("div", { class: "heat" });
    host.append(holder);
    let load = null, paint = () => {};
    keepDrawn(holder, (width) => {
      paint = drawHeatmap(holder, { layers, experts, width });
      if (load) paint(load);
    });
    return { show: (next) => { load = next; paint(next); } };
  }

  function violation(row) {
    const mean = row.reduce((a, b) => a + b, 0) / row.length;
    return mean > 0 ? Math.max(...row) / mean - 1 : 0;
  }

  function drawHeatmap(holder, { layers, experts, width }) {
    const left = 58, side = 84, top = 20;
    const wide = (width - left - side) / experts;
    const tall = clamp(wide, layers.length > 20 ? 10 : 18, layers.length <= 5 ? 42 : 28);
    const height = top + tall * layers.length + 4;
    const gap = wide > 5 ? 1.5 : wide > 3 ? 0.5 : 0;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    const every = ticks(0, experts - 1, Math.max(2, Math.min(experts, (width - left - side) / 40)), true).step;
    for (let expert = 0; expert < experts; expert += every) {
      root.append(svg("text", { x: left + wide * (expert + 0.5), y: 13, "text-anchor": "middle" }, String(expert)));
    }
    root.append(svg("text", { x: left - 8, y: 13, "text-anchor": "end" }, "expert"));
    root.append(svg("text", { x: width, y: 13, "text-anchor": "end" }, "max violation"));
    const rows = layers.map((layer, i) => {
      const y = top + tall * i, size = { y, width: Math.max(0.5, wide - gap), height: Math.max(1, tall - gap), rx: gap > 1 ? 2 : 0 };
      const labelled = tall >= 12 || i % 2 === 0;
      if (labelled) root.append(svg("text", { x: left - 8, y: y + tall / 2 + 4, "text-anchor": "end" }, `layer ${layer}`));
      root.append(svg("rect", { class: "cell-bg", x: left, y, width: wide * experts - gap, height: size.height, rx: size.rx }));
      const cells = Array.from({ length: experts }, (_, expert) =>
        root.appendChild(svg("rect", { ...size, x: left + wide * expert, "data-row": i, "data-expert": expert })));
      const bar = root.appendChild(svg("rect", { class: "vio", x: width - side + 8, y: y + tall * 0.25, height: tall * 0.5, width: 0, rx: 2 }));
      const text = root.appendChild(svg("text", { x: width, y: y + tall / 2 + 4, "text-anchor": "end", visibility: labelled ? "visible" : "hidden" }));
      return { cells, bar, text };
    });
    holder.replaceChildren(root);
    let shown = [];
    root.addEventListener("pointermove", (event) => {
      const { row, expert } = event.target.dataset;
      if (expert === undefined || !shown[row]) { hideTip(); return; }
      const share = shown[row][expert];
      showTip(event.clientX, event.clientY, [
        el("div", { class: "muted" }, `layer ${layers[row]}, expert ${expert}`),
        tipRow(null, "share of slots", format(share, true)),
        tipRow(null, "of its fair share", `${(share * experts).toFixed(2)}×`),
      ]);
    });
    root.addEventListener("pointerleave", hideTip);
    return (load) => {
      shown = load;
      load.forEach((row, i) => paintRow(rows[i], row));
      const worst = load.map(violation);
      root.setAttribute("aria-label", `Expert load, ${layers.length} layers by ${experts} experts. Max violation: ${
        layers.map((layer, i) => `layer ${layer} ${worst[i].toFixed(2)}`).join(", ")}`);
    };
  }

  function paintRow({ cells, bar, text }, row) {
    row.forEach((share, expert) => {
      const ratio = share * row.length;
      cells[expert].setAttribute("class", ratio >= 1 ? "cell over" : "cell under");
      cells[expert].setAttribute("fill-opacity", clamp(Math.abs(Math.log2(Math.max(ratio, 1e-6))), 0, 1).toFixed(2));
    });
    const over = violation(row);
    bar.setAttribute("width", (40 * clamp(over / 2, 0, 1)).toFixed(1));
    text.textContent = over.toFixed(2);
  }

  return {
    el, format, lineChart, barChart, heatmap, violation,
    smooth: (amount) => { smoothing = amount; redraws.forEach((redraw) => redraw()); },
  };
})();
