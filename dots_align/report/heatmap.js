// Heatmaps on a canvas: the pointer or the arrow keys read a cell, a note at the end of each row sums it up.
const Heat = (() => {
  const { el, clamp, showTip, hideTip, keepDrawn } = Base;
  const LEFT = 64, TOP = 20, SIDE = 74;

  function rgb(variable) {
    const probe = document.body.appendChild(el("i", { style: { color: `var(${variable})` } }));
    const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  }

  const mix = (a, b, t) => `rgb(${a.map((from, i) => Math.round(from + (b[i] - from) * t)).join(" ")})`;

  // A function from a value to a colour. ratio: 1 is neutral, 1/reach or less is full blue, reach or more full orange;
  // share: from nothing to 1; change: 0 is neutral, -1 and 1 are the ends.
  function colours(scale, reach) {
    const [neutral, over, under] = [rgb("--neutral"), rgb("--over"), rgb("--under")];
    const diverging = (t) => mix(neutral, t > 0 ? over : under, clamp(Math.abs(t), 0, 1));
    if (scale === "ratio") return (value) => diverging(value > 0 ? Math.log2(value) / Math.log2(reach) : -1);
    if (scale === "change") return diverging;
    return (value) => mix(neutral, over, clamp(value, 0, 1));
  }

  const LEGENDS = {
    ratio: ["", ""],
    share: ["none", "all"],
    change: ["less", "more"],
  };

  // rows, columns: names; at(i, j): the value of a cell; tip(i, j): rows of the tooltip; side: {title, text(i), bar(i) 0…1}.
  function map(host, { rows, columns, at, tip, label, scale = "ratio", corner = "", side = null, legend = true }) {
    const canvas = el("canvas"), holder = el("div", { class: "heat", tabindex: 0, role: "application", "aria-roledescription": "heatmap", style: { "min-height": `${TOP + rows.length * 11}px` } }, canvas);
    host.append(holder);
    const ends = LEGENDS[scale].map((text) => el("span", {}, text));
    if (legend) host.append(el("div", { class: "scale" }, ends[0], el("i", { class: scale }), ends[1]));
    const state = { rows, columns, at, tip, scale, corner, side, ends, cursor: null };
    const say = () => holder.setAttribute("aria-label", `${typeof label === "function" ? label() : label}. Arrow keys read cells.`);
    say();
    const redraw = keepDrawn(holder, (width) => paint(canvas, state, width));
    listen(holder, canvas, state, redraw);
    return { redraw: (changes = {}) => { Object.assign(state, changes); say(); redraw(); } };
  }

  function layout({ rows, columns, side }, width) {
    const right = side ? SIDE : 0;
    const wide = (width - LEFT - right) / columns.length;
    const tall = clamp(wide, rows.length > 40 ? 8 : rows.length > 20 ? 11 : 20, rows.length <= 6 ? 34 : 24);
    return { wide, tall, gap: wide > 5 ? 1.5 : wide > 3 ? 0.5 : 0, height: Math.ceil(TOP + tall * rows.length + 2), right };
  }

  // Twice the fair share is a lot where load is even; where most cells are beyond that, it takes more to stand out.
  function reachOf({ rows, columns, at }) {
    const far = rows.map((_, i) => columns.filter((_, j) => Math.abs(Math.log2(Math.max(at(i, j), 1e-9))) > 1.2).length).reduce((a, b) => a + b, 0);
    return far > 0.25 * rows.length * columns.length ? 8 : 2;
  }

  function paint(canvas, state, width) {
    const place = layout(state, width), { wide, tall, gap, height } = place, ratio = devicePixelRatio || 1;
    Object.assign(state, place, { width });
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const reach = state.scale === "ratio" ? reachOf(state) : 1, context = canvas.getContext("2d"), colour = colours(state.scale, reach);
    if (state.scale === "ratio") [`1/${reach} of its fair share or less`, `${reach} times or more`].forEach((text, i) => { state.ends[i].textContent = text; });
    context.scale(ratio, ratio);
    state.rows.forEach((_, i) => state.columns.forEach((_, j) => {
      context.fillStyle = colour(state.at(i, j));
      context.fillRect(LEFT + wide * j, TOP + tall * i, Math.max(0.6, wide - gap), Math.max(1, tall - gap));
    }));
    labels(context, state, width);
    if (state.cursor) {
      context.strokeStyle = `rgb(${rgb("--text").join(" ")})`;
      context.lineWidth = 1.5;
      context.strokeRect(LEFT + wide * state.cursor[1] - 0.5, TOP + tall * state.cursor[0] - 0.5, wide + 0.5, tall);
    }
  }

  function labels(context, { rows, columns, corner, side, wide, tall }, width) {
    const style = getComputedStyle(document.body), muted = `rgb(${rgb("--muted").join(" ")})`;
    context.font = `11px ${style.fontFamily}`;
    context.fillStyle = muted;
    context.textAlign = "right";
    context.fillText(corner, LEFT - 8, 13);
    if (side) context.fillText(side.title, width, 13);
    const everyRow = Math.max(1, Math.ceil(13 / tall)), widest = Math.max(...columns.map((name) => name.length)) * 6.6 + 8;
    rows.forEach((name, i) => {
      if (i % everyRow) return;
      const y = TOP + tall * (i + 0.5) + 3.5;
      context.fillText(name.length > 10 ? `${name.slice(0, 9)}…` : name, LEFT - 8, y);
      if (!side) return;
      context.fillText(side.text(i), width, y);
      context.globalAlpha = 0.35;
      context.fillRect(width - SIDE + 10, TOP + tall * i + tall * 0.25, (SIDE - 46) * clamp(side.bar(i), 0, 1), tall * 0.5);
      context.globalAlpha = 1;
    });
    context.textAlign = "center";
    const every = Math.max(1, Math.ceil(widest / wide));
    columns.forEach((name, j) => { if (j % every === 0) context.fillText(name, LEFT + wide * (j + 0.5), 13); });
  }

  function listen(holder, canvas, state, redraw) {
    const show = (i, j, x, y) => showTip(x, y, state.tip(i, j));
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const [i, j] = [Math.floor((event.clientY - box.top - TOP) / state.tall), Math.floor((event.clientX - box.left - LEFT) / state.wide)];
      return i >= 0 && i < state.rows.length && j >= 0 && j < state.columns.length ? [i, j] : null;
    };
    holder.addEventListener("pointermove", (event) => {
      const cell = cellAt(event);
      if (cell) show(...cell, event.clientX, event.clientY); else hideTip();
    });
    holder.addEventListener("pointerleave", hideTip);
    holder.addEventListener("blur", () => { state.cursor = null; hideTip(); redraw(); });
    holder.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      const [i, j] = state.cursor ? [state.cursor[0] + move[0], state.cursor[1] + move[1]] : [0, 0];
      state.cursor = [clamp(i, 0, state.rows.length - 1), clamp(j, 0, state.columns.length - 1)];
      redraw();
      const box = canvas.getBoundingClientRect();
      show(...state.cursor, box.left + LEFT + state.wide * state.cursor[1], box.top + TOP + state.tall * state.cursor[0]);
    });
  }

  return { map };
})();
