// Lays out the report from the JSON the runs left in it: the verdict, then a section for each stage (of several runs, the
// same stage of each drawn over one another).
(() => {
  const { el, svg, section, collapsible, segmented, known, clamp, whole, count, colour, format, duration, tipRow, keepDrawn, bytesOf, fail } = Base;
  const { runs, generated } = Base.data();
  const page = document.getElementById("page");
  const many = runs.length > 1;
  const pending = [];
  const CHECKS = [["numbers", "numbers"], ["grader", "grader"], ["router_shift", "router"], ["mismatch", "mismatch"], ["data", "data"], ["length", "length"], ["zero_variance", "groups"], ["step_size", "step size"], ["hacking", "held-out"]];

  // ---- words ------------------------------------------------------------------------------------------------------
  const moment = (text) => text.replace("T", " ").replace(/(:\d\d)(:\d\d)?(\.\d+)?Z$/, "$1 UTC");
  const short = (name) => name.replace(/^eval\//, "held-out ").replace(/^[\w.-]+\//, "").replaceAll("_", " ");
  const tone = (run) => colour(runs.indexOf(run));
  const runDot = (run) => (many ? el("i", { class: "run-dot", style: { background: tone(run) } }) : null);

  // A slot is a stage of the page: one stage of one run, or the stages of that kind of all runs.
  function slots() {
    if (!many) return runs[0].stages.map((stage) => ({ name: stage.name, entries: [{ run: runs[0], stage }] }));
    const found = new Map();
    for (const run of runs) {
      const seen = {};
      for (const stage of run.stages) {
        seen[stage.kind] = (seen[stage.kind] || 0) + 1;
        const name = seen[stage.kind] > 1 ? `${stage.kind} ${seen[stage.kind]}` : stage.kind;
        if (!found.has(name)) found.set(name, []);
        found.get(name).push({ run, stage });
      }
    }
    return [...found].map(([name, entries]) => ({ name, entries }));
  }

  const SLOTS = slots();
  SLOTS.forEach((slot, i) => { slot.id = `stage-${i}`; slot.span = new Charts.Span(); });
  const slotOf = (stage) => SLOTS.find((slot) => slot.entries.some((entry) => entry.stage === stage));

  // ---- the top ----------------------------------------------------------------------------------------------------
  const EYEBROW = { good: "went well", flat: "no clear gain", bad: "went wrong", open: "report" };

  function headline() {
    const box = el("header", { class: "hero" });
    for (const run of runs) {
      const stages = run.stages.length, seconds = run.stages.reduce((sum, stage) => sum + (stage.seconds || 0), 0), version = run.stages.find((stage) => stage.version)?.version;
      const facts = [run.stages[0]?.created && `started ${moment(run.stages[0].created)}`, seconds && duration(seconds), version && `dots_align ${version}`, run.export && `exported to ${run.export}`];
      box.append(el("div", { class: `verdict ${run.verdict.level}` },
        el("p", { class: "eyebrow" }, el("i", { class: "light" }), runDot(run), el("b", {}, run.name), stages > 1 ? ` · ${run.stages.map((stage) => stage.name).join(" → ")}` : "", el("span", { class: "state" }, EYEBROW[run.verdict.level])),
        el(many ? "h2" : "h1", {}, run.verdict.text),
        el("p", { class: "muted meta" }, facts.filter(Boolean).join("  ·  "))));
    }
    const path = stairs();
    return path ? el("div", { class: "top-grid" }, box, path) : box;
  }

  // Exact match from stage to stage, a dot for each.
  function stairs() {
    const lines = runs.map((run) => ({ run, dots: [...(known(run.start) ? [["start", run.start]] : []), ...run.stages.filter((stage) => known(stage.summary.exact_match)).map((stage) => [stage.name, stage.summary.exact_match])] })).filter((line) => line.dots.length > 1);
    if (!lines.length) return null;
    const holder = el("div", { class: "chart" }), said = lines.map((line) => `${many ? `${line.run.name}: ` : ""}${line.dots.map(([name, value]) => `${name} ${format(value, true)}`).join(", ")}`).join("; ");
    keepDrawn(holder, (width) => {
      const height = 168, most = Math.max(...lines.map((line) => line.dots.length));
      const x = (i) => 34 + (i / (most - 1)) * (width - 68), y = (value) => 132 - value * 96;
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Held-out exact match: ${said}` });
      for (const value of [0, 0.5, 1]) root.append(svg("line", { class: "gridline", x1: 0, x2: width, y1: y(value), y2: y(value) }));
      for (const { run, dots } of lines) {
        root.append(svg("path", { class: "stair", d: dots.map(([, value], i) => `${i ? "L" : "M"}${x(i)} ${y(value)}`).join(""), style: { stroke: tone(run) } }));
        dots.forEach(([name, value], i) => root.append(svg("circle", { class: "bead", cx: x(i), cy: y(value), r: 7, style: { fill: tone(run) } }),
          many ? "" : svg("text", { class: "strong", x: x(i), y: y(value) - 15, "text-anchor": "middle" }, format(value, true)),
          lines.length > 1 && run !== lines[0].run ? "" : svg("text", { x: x(i), y: height - 12, "text-anchor": "middle" }, name)));
      }
      holder.replaceChildren(root);
    });
    return el("section", { class: "card stairs" }, el("header", {}, el("h3", {}, "Held-out exact match")), holder);
  }

  function notices() {
    const said = runs.flatMap((run) => run.notices.map((text) => (many ? `${run.name}: ${text}` : text)));
    return said.length ? el("div", { class: "notice", role: "note" }, el("b", {}, "Worth knowing"), el("ul", {}, said.map((text) => el("li", {}, text)))) : null;
  }

  // ---- autopsy ----------------------------------------------------------------------------------------------------
  function autopsies() {
    const ill = runs.flatMap((run) => run.stages.filter((stage) => stage.findings.length).map((stage) => ({ run, stage })));
    const box = el("section", { class: `card autopsy ${ill.length ? "ill" : "well"}`, "aria-label": "Autopsy" });
    const looked = runs.some((run) => run.stages.some((stage) => stage.outcome.verdict !== "unknown"));
    if (!ill.length && !looked) return null;
    const seen = new Set(ill.flatMap(({ stage }) => stage.findings.map((finding) => finding.cause)));
    const checks = el("ul", { class: "checks", "aria-label": "causes looked for" }, CHECKS.map(([cause, name]) => el("li", { class: seen.has(cause) ? "bad" : "" }, el("i", { "aria-hidden": "true" }, seen.has(cause) ? "✕" : "✓"), name, el("span", { class: "unseen" }, seen.has(cause) ? ": found" : ": nothing found"))));
    box.append(el("header", {}, el("h3", {}, "Autopsy"), el("span", { class: "muted small" }, ill.length ? "the likely cause, and what followed" : "no known cause of failure shows"), checks));
    ill.forEach(({ run, stage }) => stage.findings.forEach((finding, i) => box.append(findingOf(run, stage, finding, i === 0))));
    return box;
  }

  function findingOf(run, stage, finding, first) {
    const shown = finding.series.filter((name) => stage.series[name]).slice(0, 3);
    const steps = stage.steps || 1, around = known(finding.first_step) ? [clamp(Math.round(finding.first_step - steps * 0.12), 0, steps), clamp(Math.round(finding.first_step + steps * 0.2), 1, steps)] : null;
    const look = () => { const slot = slotOf(stage); slot.span.set(around && around[1] > around[0] ? around : null); document.getElementById(slot.id).scrollIntoView(); };
    return el("article", { class: `finding${first ? " first" : ""}` },
      el("div", {}, el("p", { class: "eyebrow" }, runDot(run), many ? `${run.name} · ` : "", stage.name, known(finding.first_step) ? ` · from step ${whole(finding.first_step)}` : "", first ? el("span", { class: "state" }, "likely cause") : el("span", { class: "muted" }, " · also seen")),
        el("h4", {}, finding.title), el("ul", {}, finding.evidence.map((text) => el("li", {}, text))), el("p", { class: "advice" }, finding.advice),
        el("button", { type: "button", onclick: look }, "Look at these steps")),
      el("div", { class: "exhibits" }, shown.map((name) => {
        const cell = el("div", {}, el("div", { class: "mini" }, short(name)));
        Charts.chart(cell, { series: [{ ...stage.series[name], name: short(name), tone: "var(--bad)" }], label: short(name), height: 104, legend: false, marker: finding.first_step });
        return cell;
      })));
  }

  // ---- a stage ----------------------------------------------------------------------------------------------------
  function stageSection(slot) {
    const box = el("section", { class: "stage", id: slot.id, "aria-label": slot.name, tabindex: -1 });
    const chip = el("button", { type: "button", class: "chip", hidden: true, onclick: () => slot.span.set(null) });
    slot.span.watchers.push((zoom) => { chip.hidden = !zoom; if (zoom) chip.textContent = `steps ${whole(zoom[0])}–${whole(zoom[1])} ✕`; });
    box.append(el("div", { class: "stage-head" }, el("h2", {}, slot.name), slot.entries.map(({ run, stage }) => provenance(run, stage)), chip));
    for (const build of [facts, curves, experts, samples, allMetrics, recipe]) section(box, () => build(slot));
    return box;
  }

  function provenance(run, stage) {
    const told = [many ? run.name : stage.kind !== stage.name && stage.kind, stage.recipe_hash && `recipe ${stage.recipe_hash.slice(0, 8)}`, stage.data_hash && `data ${stage.data_hash.slice(0, 8)}`];
    return el("span", { class: "muted small mono" }, runDot(run), told.filter(Boolean).join("  "));
  }

  function facts(slot) {
    const rows = slot.entries.map(({ run, stage }) => {
      const { summary } = stage, line = (name) => stage.series[name];
      const values = [
        ["exact match", known(summary.exact_match) && format(summary.exact_match, true), line("eval/exact_match"), stage.best && `best: ${stage.best}`],
        ["reward", known(summary.reward) && format(summary.reward), line(`${stage.kind}/reward`)],
        ["loss", known(summary.loss) && format(summary.loss), line(`${stage.kind}/loss`)],
        ["length", known(summary.mean_length) && format(summary.mean_length), line(`${stage.kind}/response_length`) || line("eval/mean_length"), "tokens"],
        ["ends by itself", known(summary.stop_rate) && format(summary.stop_rate, true), line("eval/stop_rate")],
        ["steps", known(stage.steps) && whole(stage.steps)], ["time", duration(stage.seconds)],
      ].filter(([, value]) => value);
      if (!values.length) return el("div", { class: "card empty" }, many ? `${run.name}: nothing measured yet.` : "Nothing measured yet.");
      return el("div", { class: "card tiles" }, many ? el("div", { class: "tile who" }, runDot(run), run.name) : null, values.map(([name, value, series, note]) => el("div", { class: "tile" },
        el("span", {}, name), el("b", {}, value), (series && Charts.spark(series, many ? tone(run) : colour(0))) || el("span", { class: "note", title: note }, note || ""))));
    });
    return el("div", { class: "facts-of-stage" }, rows);
  }

  // The series of some metrics: of one run a colour each, of several the run's colour and a dash for each metric.
  function seriesOf(slot, names) {
    if (slot.entries.length === 1 && !many) return names.map((name, i) => ({ ...slot.entries[0].stage.series[name], name: short(name), tone: colour(i) }));
    return names.flatMap((name, i) => slot.entries.filter(({ stage }) => stage.series[name]).map(({ run, stage }) =>
      ({ ...stage.series[name], name: names.length > 1 ? `${run.name}: ${short(name)}` : run.name, tone: tone(run), dash: Charts.DASHES[i % Charts.DASHES.length] })));
  }

  // Of several runs and metrics: what the colours are, then what the dashes are.
  const comparedLegend = (slot, names) => el("div", { class: "legend" }, slot.entries.map(({ run }) => el("span", {}, el("i", { style: { background: tone(run) } }), run.name)),
    names.map((name, i) => el("span", {}, el("i", { class: "dashed", style: { "border-top": ["2px solid", "2px dashed", "2px dotted", "4px double"][i % 4] } }), short(name))));

  // Every panel that some run has, with the metrics of all.
  function panelsOf(slot, which) {
    const found = new Map();
    for (const { stage } of slot.entries) {
      for (const panel of stage[which]) {
        const known = found.get(panel.title);
        if (known) known.names = [...new Set([...known.names, ...panel.names])];
        else found.set(panel.title, { ...panel, names: [...panel.names] });
      }
    }
    return [...found.values()];
  }

  function curves(slot) {
    const panels = panelsOf(slot, "panels");
    if (!panels.length) return null;
    const grid = el("div", { class: "grid curves" });
    for (const panel of panels) {
      const stack = panel.kind === "stack" && !many, series = seriesOf(slot, panel.names);
      const legend = many && panel.names.length > 1 ? comparedLegend(slot, panel.names) : true;
      grid.append(Charts.card({ title: panel.title, legend, note: stack ? `${panel.note}${shares(series)}` : panel.note, series, span: slot.span, scale: panel.scale, kind: stack ? "stack" : "lines" }));
    }
    const thinned = slot.entries.flatMap(({ stage }) => Object.values(stage.series)).filter((series) => series.total > series.steps.length);
    if (!thinned.length) return grid;
    const most = thinned.reduce((a, b) => (a.total > b.total ? a : b));
    return el("div", {}, grid, el("p", { class: "muted small" }, `Long curves are thinned: ${whole(most.steps.length)} of ${whole(most.total)} points, the lowest and the highest of each stretch.`));
  }

  function shares(series) {
    const sums = series.map((one) => one.values.filter(known).reduce((a, b) => a + b, 0)), total = sums.reduce((a, b) => a + b, 0);
    return total ? `: ${series.map((one, i) => `${one.name.replace(/ seconds$/, "")} ${Math.round((100 * sums[i]) / total)}%`).join(", ")}` : "";
  }

  // ---- experts ----------------------------------------------------------------------------------------------------
  function experts(slot) {
    const entries = slot.entries.filter(({ stage }) => stage.router);
    if (!entries.length) return null;
    const holder = el("div"), box = el("section", { class: "card experts", "aria-label": "Expert load" }, el("header", {}, el("h3", {}, "Expert load"), chooser(entries, (entry) => pending.push(loadExperts(holder, slot, entry)))), holder);
    pending.push(loadExperts(holder, slot, entries[0]));
    return box;
  }

  // Which run a part of a comparison is about.
  function chooser(entries, onchange) {
    if (entries.length < 2) return null;
    return el("select", { "aria-label": "run", onchange: (event) => onchange(entries[+event.target.value]) }, entries.map(({ run }, i) => el("option", { value: i }, run.name)));
  }

  async function loadExperts(holder, slot, { stage }) {
    try {
      const bytes = new DataView(await bytesOf(stage.router.loads));
      const shares = Float32Array.from({ length: bytes.byteLength / 2 }, (_, i) => bytes.getUint16(2 * i, true) / 65535);
      holder.replaceChildren(expertViews(slot, stage.router, shares));
    } catch (error) {
      fail(error.message);
      holder.replaceChildren(el("div", { class: "notice" }, `This part could not be drawn: ${error.message}`));
    }
  }

  function expertViews(slot, router, shares) {
    const { layers, steps, experts: width } = router, size = layers.length * width;
    const share = (at, layer, expert) => shares[at * size + layer * width + expert];
    const violation = (at, layer) => Math.max(...Array.from({ length: width }, (_, expert) => share(at, layer, expert))) * width - 1;
    const tip = (at, layer, expert) => [el("div", { class: "muted" }, `step ${whole(steps[at])}, layer ${layers[layer]}, expert ${expert}`), tipRow(null, "share of slots", format(share(at, layer, expert), true)), tipRow(null, "of its fair share", `${(share(at, layer, expert) * width).toFixed(2)}×`)];
    let at = steps.length - 1, layer = 0;
    const slider = el("input", { type: "range", min: 0, max: at, value: at, "aria-label": "step of the expert load", disabled: at === 0 });
    const output = el("output", { class: "num" }), names = Array.from({ length: width }, (_, i) => String(i));
    const byStep = el("div", { class: "view" }, el("div", { class: "slider" }, el("span", { class: "small muted" }, "step"), slider, output));
    const map = Heat.map(byStep, { rows: layers.map((one) => `layer ${one}`), columns: names, corner: "expert", at: (i, j) => share(at, i, j) * width, tip: (i, j) => tip(at, i, j),
      label: () => `Expert load at step ${steps[at]}. Max violation: ${layers.map((one, i) => `layer ${one} ${violation(at, i).toFixed(2)}`).join(", ")}`,
      side: { title: "violation", text: (i) => violation(at, i).toFixed(2), bar: (i) => violation(at, i) / 4 } });
    const which = el("select", { "aria-label": "layer" }, layers.map((one, i) => el("option", { value: i }, `layer ${one}`)));
    const over = el("div", { class: "view", hidden: true }, el("div", { class: "slider" }, el("span", { class: "small muted" }, "over the run, of"), which)), shown = thinnedRows(steps);
    const history = Heat.map(over, { rows: shown.map((i) => whole(steps[i])), columns: names, corner: "step", at: (i, j) => share(shown[i], layer, j) * width, tip: (i, j) => tip(shown[i], layer, j), label: () => `Load of the experts of layer ${layers[layer]} over ${steps.length} steps` });
    const right = el("div", {}, el("h4", {}, "Max violation ", el("span", { class: "muted" }, "busiest expert over the mean, minus 1"))), said = el("p", { class: "muted small" });
    const line = Charts.chart(right, { series: Object.entries(router.violation).map(([name, one]) => ({ ...one, name })), label: "Max violation", height: 190, span: slot.span });
    right.append(said);
    const show = () => {
      at = +slider.value;
      map.redraw();
      line.mark(steps[at]);
      const all = layers.map((_, i) => violation(at, i)), worst = all.indexOf(Math.max(...all));
      output.textContent = `${whole(steps[at])} (${at + 1} of ${steps.length})`;
      said.textContent = `At step ${whole(steps[at])} the worst is layer ${layers[worst]} with ${all[worst].toFixed(2)}; the mean of layers is ${(all.reduce((a, b) => a + b, 0) / all.length).toFixed(2)}.`;
    };
    slider.addEventListener("input", show);
    which.addEventListener("change", () => { layer = +which.value; history.redraw(); });
    const views = segmented("view", [["step", "layers at a step"], ["run", "a layer over the run"]], (value) => { byStep.hidden = value !== "step"; over.hidden = value === "step"; });
    show();
    const kept = router.total > steps.length ? ` · ${steps.length} of ${whole(router.total)} snapshots kept` : "";
    return el("div", {}, el("p", { class: "with" }, el("span", { class: "muted small" }, `${count(layers.length, "MoE layer")} × ${count(width, "expert")}${kept}`), views), el("div", { class: `split${width > 48 ? " wide" : ""}` }, el("div", {}, byStep, over), right));
  }

  // At most 48 rows, evenly.
  function thinnedRows(steps) {
    const rows = Math.min(48, steps.length);
    return Array.from({ length: rows }, (_, i) => Math.round((i * (steps.length - 1)) / Math.max(1, rows - 1)));
  }

  // ---- samples ----------------------------------------------------------------------------------------------------
  function samples(slot) {
    const sets = slot.entries.flatMap(({ run, stage }) => stage.samples.map((set) => ({ run, set })));
    if (!sets.length) return null;
    const holder = el("div", { class: "samples" }), about = el("span", { class: "muted small" });
    const pick = el("select", { "aria-label": "which samples", onchange: () => show(sets[+pick.value]) }, sets.map(({ run, set }, i) => el("option", { value: i }, many ? `${run.name}: ${set.label}` : set.label)));
    const show = ({ set }) => {
      const parts = [set.about, set.shown < set.total ? `${whole(set.shown)} of ${whole(set.total)}, spread evenly over the run` : count(set.total, "sample"), set.detailed && set.detailed < set.shown ? `${whole(set.detailed)} with tokens` : ""];
      about.textContent = parts.filter(Boolean).join(" · ");
      const drawn = Samples.browser(holder, set, slot.span).catch((error) => { fail(error.message); holder.append(el("div", { class: "notice" }, `The samples could not be read: ${error.message}`)); });
      pending.push(drawn);
    };
    show(sets[0]);
    return el("section", { class: "card samples-card", "aria-label": "Samples" }, el("header", {}, el("h3", {}, "Samples"), sets.length > 1 ? pick : null, about), holder);
  }

  // ---- the rest ---------------------------------------------------------------------------------------------------
  function allMetrics(slot) {
    const groups = panelsOf(slot, "groups");
    if (!groups.length) return null;
    const details = collapsible("All metrics", `${groups.reduce((sum, group) => sum + group.names.length, 0)} more, by name`);
    const filter = el("input", { type: "search", placeholder: "Filter by name", "aria-label": "filter metrics by name" });
    const cells = [], body = el("div");
    details.append(el("div", { class: "tools" }, filter), body);
    filter.addEventListener("input", () => cells.forEach(([name, cell]) => { cell.hidden = !name.includes(filter.value.toLowerCase()); }));
    details.addEventListener("toggle", () => {
      if (body.childElementCount) return;
      for (const group of groups) {
        const grid = el("div", { class: "grid all" });
        body.append(el("h4", {}, group.title), grid);
        for (const name of group.names) {
          const series = seriesOf(slot, [name]), latest = series[0].values.filter(known).slice(-1)[0];
          const cell = grid.appendChild(el("div", {}, el("div", { class: "mini" }, short(name), many ? null : el("b", {}, format(latest)))));
          cells.push([name.toLowerCase().replaceAll("_", " ") + name.toLowerCase(), cell]);
          Charts.chart(cell, { series, label: short(name), height: 112, legend: false, span: slot.span });
        }
      }
    });
    return details;
  }

  function flatten(values, prefix = "") {
    return Object.entries(values).flatMap(([key, value]) => {
      if (known(value) && typeof value === "object" && !Array.isArray(value)) return flatten(value, `${prefix}${key}.`);
      const text = Array.isArray(value) ? value.map((item) => (typeof item === "object" ? JSON.stringify(item) : String(item))).join(", ") || "none" : known(value) ? String(value) : "none";
      return [[prefix + key, text]];
    });
  }

  function recipe(slot) {
    const recipes = slot.entries.map(({ stage }) => new Map(flatten(stage.recipe)));
    if (recipes.every((one) => !one.size)) return null;
    return recipes.length > 1 ? recipeTable(slot, recipes) : recipeList(slot.entries[0].stage, recipes[0]);
  }

  function recipeTable(slot, recipes) {
    const keys = [...new Set(recipes.flatMap((one) => [...one.keys()]))].filter((key) => new Set(recipes.map((one) => one.get(key))).size > 1);
    const details = collapsible("Recipes", keys.length ? `${count(keys.length, "key")} that differ` : "the same");
    details.open = true;
    details.append(el("div", { class: "scroll" }, el("table", { class: "diff" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "key"), slot.entries.map(({ run }) => el("th", { scope: "col" }, runDot(run), run.name)))),
      el("tbody", {}, keys.map((key) => el("tr", {}, el("th", { scope: "row" }, key), recipes.map((one) => el("td", { class: "mono" }, one.get(key) ?? "–"))))))));
    return details;
  }

  function recipeList(stage, values) {
    const groups = new Map();
    for (const [key, value] of values) {
      const [head, ...rest] = key.split(".");
      const group = rest.length ? head : "";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push([rest.join(".") || head, value]);
    }
    const details = collapsible("Recipe", stage.recipe_hash ? `hash ${stage.recipe_hash.slice(0, 12)}` : "");
    details.append(el("div", { class: "recipe" }, [...groups].map(([name, entries]) => el("section", {}, name ? el("h4", {}, name) : null,
      el("dl", {}, entries.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))))))));
    return details;
  }

  // ---- the page ---------------------------------------------------------------------------------------------------
  function navigation() {
    const nav = document.getElementById("nav");
    nav.append(el("a", { href: "#page" }, "Summary"), ...SLOTS.map((slot) => el("a", { href: `#${slot.id}`, class: slot.entries.some(({ stage }) => stage.findings.length) ? "bad" : null }, slot.name)));
    const links = [...nav.children];
    const spy = () => {
      const passed = SLOTS.filter((slot) => document.getElementById(slot.id).getBoundingClientRect().top < innerHeight * 0.25).length;
      links.forEach((link, i) => link.setAttribute("aria-current", i === passed));
    };
    addEventListener("scroll", spy, { passive: true });
    spy();
  }

  const openAll = () => document.querySelectorAll("details").forEach((details) => { details.open = true; });

  for (const build of [headline, notices, autopsies]) section(page, build);
  for (const slot of SLOTS) section(page, () => stageSection(slot));
  page.append(el("footer", {}, `Written by dots_align on ${moment(generated)}. This file needs no network. Drag over a curve to zoom, double-click to see all; add #all to the address to open every section.`));
  section(page, () => { navigation(); });
  document.getElementById("smoothing").addEventListener("change", (event) => Charts.smooth(+event.target.value));
  addEventListener("beforeprint", openAll);
  if (location.hash === "#all") openAll();
  requestAnimationFrame(() => Promise.allSettled(pending).then(() => { document.documentElement.dataset.ready = "true"; }));
})();
