"use strict";
// What every page of this look stands on: elements, numbers, the tooltip, compressed data. Model output reaches the page
// as text nodes only.
const Base = (() => {
  const SVG = document.querySelector("svg").namespaceURI;
  const COLOURS = 8;
  const root = document.documentElement;
  const errors = [];

  function fail(message) {
    errors.push(String(message));
    root.dataset.errors = errors.join(" | ");
  }
  window.onerror = (message) => { fail(message); };
  window.addEventListener("unhandledrejection", (event) => fail(event.reason));
  document.addEventListener("securitypolicyviolation", (event) => fail(`blocked ${event.violatedDirective}`));

  // ---- elements ---------------------------------------------------------------------------------------------------
  const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  // One broken section must not take the rest of the page with it.
  function section(host, build) {
    try {
      const node = build();
      if (node) host.append(node);
    } catch (error) {
      fail(error.message);
      host.append(el("div", { class: "notice" }, `This part could not be drawn: ${error.message}`));
    }
  }

  const collapsible = (title, note) => el("details", { class: "card fold" }, el("summary", {}, title, note ? el("span", { class: "muted" }, ` ${note}`) : null));

  // A choice of a few, as radio buttons: arrow keys move through it, screen readers say which.
  let groups = 0;
  function segmented(label, options, onchange) {
    const name = `choice-${++groups}`;
    const inputs = options.map(([value], i) => el("input", { type: "radio", name, value, id: `${name}-${i}`, checked: i === 0, onchange: () => onchange(value) }));
    return el("span", { class: "segmented", role: "radiogroup", "aria-label": label },
      inputs.map((input, i) => [input, el("label", { for: input.id }, options[i][1])]));
  }

  // ---- numbers ----------------------------------------------------------------------------------------------------
  const known = (value) => value !== null && value !== undefined;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const whole = (value) => value.toLocaleString("en-US");
  const count = (value, noun) => `${whole(value)} ${noun}${value === 1 ? "" : "s"}`;
  const colour = (index) => `var(--s${index % COLOURS})`;

  function format(value, percent = false) {
    if (!known(value)) return "–";
    if (percent) return `${Math.abs(value) < 0.01 ? +(value * 100).toPrecision(2) : +(value * 100).toFixed(1)}%`;
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1000) return whole(Math.round(value));
    return String(+value.toPrecision(4));
  }

  function duration(seconds) {
    if (!known(seconds)) return "";
    if (seconds < 60) return `${+seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 60 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  // The index of the sorted value that is nearest.
  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle; else high = middle;
    }
    return value - sorted[low] <= sorted[high] - value ? low : high;
  }

  // ---- tooltip ----------------------------------------------------------------------------------------------------
  const tip = () => document.getElementById("tip");

  function showTip(x, y, ...rows) {
    const node = tip();
    node.replaceChildren(...rows.flat().filter(Boolean));
    node.hidden = false;
    const box = node.getBoundingClientRect();
    node.style.left = `${clamp(x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14, 4, Math.max(4, innerWidth - box.width - 4))}px`;
    node.style.top = `${clamp(y - box.height - 12 < 4 ? y + 18 : y - box.height - 12, 4, Math.max(4, innerHeight - box.height - 4))}px`;
  }

  const hideTip = () => { tip().hidden = true; };
  const tipRow = (swatch, name, value) => el("div", { class: "row" },
    el("span", {}, swatch ? el("i", { style: { background: swatch } }) : null, name), el("b", {}, value));

  // ---- drawing ----------------------------------------------------------------------------------------------------
  const redraws = new Set();

  // Draws when there is room and the place is near the window, and again whenever the width changes.
  function keepDrawn(host, draw) {
    let width = 0, near = false;
    const redraw = (force) => {
      const now = Math.floor(host.clientWidth);
      if (!near || now < 40 || (now === width && force !== true)) return;
      width = now;
      draw(now);
    };
    redraws.add(() => redraw(true));
    // Drawing inside the callback changes the size it reports on, which browsers raise as an error: wait for the next frame.
    new ResizeObserver(() => requestAnimationFrame(redraw)).observe(host);
    new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) { near = true; redraw(); } }, { rootMargin: "600px" }).observe(host);
    return () => redraw(true);
  }

  const redrawAll = () => redraws.forEach((redraw) => redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

  // ---- compressed data --------------------------------------------------------------------------------------------
  async function bytesOf(name) {
    const text = atob(document.getElementById(name).textContent);
    const packed = Uint8Array.from(text, (character) => character.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).arrayBuffer();
  }

  const jsonOf = async (name) => JSON.parse(new TextDecoder().decode(await bytesOf(name)));
  const data = () => JSON.parse(document.getElementById("data").textContent);

  return { el, svg, section, collapsible, segmented, known, clamp, whole, count, colour, format, duration, nearest,
    showTip, hideTip, tipRow, keepDrawn, redrawAll, bytesOf, jsonOf, data, fail };
})();
