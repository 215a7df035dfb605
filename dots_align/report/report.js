// Lays out the page from the JSON the run left in it. Everything a model wrote goes through text nodes, never through HTML.
(() => {
  const root = document.documentElement;
  const errors = [];
  function fail(message) {
    errors.push(String(message));
    root.dataset.errors = errors.join(" | ");
  }
  window.onerror = (message) => { fail(message); };
  window.addEventListener("unhandledrejection", (event) => fail(event.reason));
  document.addEventListener("securitypolicyviolation", (event) => fail(`blocked ${event.violatedDirective}`));

  const { el, format } = Charts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const PAGE_ROWS = 25;

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

  // ---- words ------------------------------------------------------------------------------------------------------
  function duration(seconds) {
    if (seconds === null) return "–";
    const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor((whole % 3600) / 60);
    if (hours) return `${hours} h ${minutes} min`;
    return minutes ? `${minutes} min ${whole % 60} s` : `${seconds < 10 ? +seconds.toFixed(1) : whole} s`;
  }

  const moment = (text) => text.replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?Z$/, "$1 $2 UTC");
  const count = (number, noun) => `${number.toLocaleString("en-US")} ${noun}${number === 1 ? "" : "s"}`;
  const chartName = (name) => name.replace(/^(eval)\//, "held-out ").replaceAll("_", " ");
  const known = (value) => value !== null && value !== undefined;

  function facts(stage) {
    const s = stage.summary;
    return [
      ["Exact match", known(s.exact_match) && format(s.exact_match, true), "held-out"],
      ["Stop rate", known(s.stop_rate) && format(s.stop_rate, true), "ended in time"],
      ["Mean length", known(s.mean_length) && format(s.mean_length), "tokens a response"],
      ["Loss", known(s.loss) && format(s.loss), "final"],
      ["Reward", known(s.reward) && format(s.reward), "final"],
      ["Steps", known(stage.steps) && stage.steps.toLocaleString("en-US"), "last logged"],
      ["Time", known(stage.seconds) && duration(stage.seconds), "wall clock"],
      ["Best checkpoint", stage.best.replace(/^checkpoint-/, "step "), "by held-out score"],
    ];
  }

  // ---- header and summary -----------------------------------------------------------------------------------------
  function header() {
    const created = data.stages.map((stage) => stage.created).filter(Boolean).sort()[0];
    const versions = [...new Set(data.stages.map((stage) => stage.version).filter(Boolean))];
    const meta = [
      data.stages.length ? data.stages.map((stage) => (data.stages.length > 1 ? stage.name : stage.kind)).join(" → ") : "no stages yet",
      created && `started ${moment(created)}`,
      versions.length && `dots_align ${versions.join(", ")}`,
      data.export && `export ${data.export}`,
      `report written ${moment(data.generated)}`,
    ];
    return el("div", { class: "title" }, el("h1", {}, data.name), el("div", { class: "meta" }, ...meta.filter(Boolean).map((text) => el("span", {}, text))));
  }

  function notices() {
    if (!data.notices.length) return null;
    return el("div", { class: "notice", role: "note" }, el("strong", {}, "While reading this run"), el("ul", {}, ...data.notices.map((text) => el("li", {}, text))));
  }

  function summary() {
    const bars = data.stages.filter((stage) => known(stage.summary.exact_match)).map((stage) => ({ name: stage.name, value: stage.summary.exact_match }));
    if (bars.length && known(data.start)) bars.unshift({ name: "start", value: data.start, muted: true });
    const withChart = bars.length > 1;
    const grid = el("div", { class: `grid summary${withChart ? "" : " alone"}` });
    if (withChart) {
      const card = el("section", { class: "card", id: "accuracy" }, el("h3", {}, "Accuracy through the pipeline"), el("p", { class: "muted small" }, "held-out exact match after each stage"));
      grid.append(card);
      Charts.barChart(card, { bars, label: "Held-out exact match" });
    }
    if (data.stages.length > 1) grid.append(stageTable());
    return grid.childNodes.length ? grid : null;
  }

  function stageTable() {
    const columns = facts(data.stages[0]).map(([name]) => name);
    const used = columns.filter((_, i) => data.stages.some((stage) => facts(stage)[i][1]));
    const head = el("tr", {}, el("th", { scope: "col" }, "Stage"), ...used.map((name) => el("th", { scope: "col", class: name === "Best checkpoint" ? null : "num" }, name)));
    let before = data.start;
    const rows = data.stages.map((stage) => {
      const values = Object.fromEntries(facts(stage));
      const cells = used.map((name) => el("td", { class: name === "Best checkpoint" ? null : "num" }, values[name] || "–"));
      const now = stage.summary.exact_match;
      if (known(now) && known(before) && used[0] === "Exact match") {
        const points = +((now - before) * 100).toFixed(1);
        cells[0].append(el("div", { class: `small ${points > 0 ? "up" : points < 0 ? "down" : "muted"}` }, `${points > 0 ? "+" : points < 0 ? "−" : "±"}${Math.abs(points)} pts`));
      }
      before = known(now) ? now : before;
      return el("tr", {}, el("td", {}, el("a", { href: `#${anchor(stage)}` }, stage.name)), ...cells);
    });
    return el("section", { class: "card" }, el("h3", {}, "Stages"), el("div", { class: "scroll" }, el("table", { id: "stages" }, el("thead", {}, head), el("tbody", {}, ...rows))));
  }

  const anchor = (stage) => `stage-${data.stages.indexOf(stage)}`;

  // ---- one stage --------------------------------------------------------------------------------------------------
  function stageSection(stage) {
    const box = el("section", { class: "stage", id: anchor(stage), "aria-label": stage.name });
    const when = [stage.created && `started ${moment(stage.created)}`, stage.recipe_hash && `recipe ${stage.recipe_hash.slice(0, 12)}`];
    if (data.stages.length > 1) box.append(el("div", { class: "stage-head" }, el("h2", {}, stage.name), stage.kind !== stage.name ? el("span", { class: "tag" }, stage.kind) : null,
      ...when.filter(Boolean).map((text) => el("span", { class: "muted small" }, text))));
    for (const build of [tiles, curves, experts, samples, evaluations, allMetrics, recipe]) section(box, () => build(stage));
    return box;
  }

  function tiles(stage) {
    const shown = facts(stage).filter(([, value]) => value);
    if (!shown.length) return el("div", { class: "card empty" }, "Nothing measured yet.");
    return el("div", { class: "card tiles" }, ...shown.map(([name, value, note]) => el("div", { class: "tile" }, el("span", {}, name), el("b", value.length > 9 ? { class: "long", title: value } : {}, value), el("span", {}, note))));
  }

  const pick = (stage, names) => names.map((name) => ({ ...stage.series[name], name: chartName(name) }));

  function curves(stage) {
    if (!stage.panels.length) return null;
    const grid = el("div", { class: `grid curves${stage.panels.length === 3 ? " three" : ""}` });
    for (const panel of stage.panels) {
      const card = el("section", { class: "card" }, el("h3", {}, panel.title));
      grid.append(card);
      Charts.lineChart(card, { series: pick(stage, panel.names), label: panel.title, percent: panel.percent, legend: true });
    }
    const thinned = Object.values(stage.series).filter((series) => series.total > series.steps.length);
    if (!thinned.length) return grid;
    const most = thinned.reduce((a, b) => (a.total > b.total ? a : b));
    const note = `Long curves are thinned: ${most.steps.length.toLocaleString("en-US")} of ${most.total.toLocaleString("en-US")} points, the lowest and the highest of each stretch.`;
    return el("div", {}, grid, el("p", { class: "muted small", style: { marginTop: "8px" } }, note));
  }

  function experts(stage) {
    const router = stage.router;
    if (!router) return null;
    const last = router.steps.length - 1, width = router.loads[0][0].length;
    const slider = el("input", { type: "range", min: 0, max: last, value: last, "aria-label": "step of the expert load", disabled: last === 0 });
    const output = el("output", { class: "num" });
    const said = el("p", { class: "muted small" });
    const left = el("div", {}, el("div", { class: "slider" }, el("span", { class: "small muted" }, "step"), slider, output));
    const right = el("div", {}, el("h3", {}, "Max violation over the run"));
    const map = Charts.heatmap(left, { layers: router.layers, experts: width });
    left.append(el("div", { class: "scale" }, "half its fair share or less", el("i"), "double or more"));
    const chart = Charts.lineChart(right, { series: Object.entries(router.violation).map(([name, one]) => ({ ...one, name })), label: "Max violation", height: 190 });
    right.append(said);
    const show = () => {
      const at = +slider.value, load = router.loads[at], over = load.map(Charts.violation);
      const worst = over.indexOf(Math.max(...over));
      map.show(load);
      chart.mark(router.steps[at]);
      output.textContent = `${router.steps[at].toLocaleString("en-US")} (${at + 1} of ${last + 1})`;
      said.textContent = `At this step: worst ${over[worst].toFixed(2)} (layer ${router.layers[worst]}), mean of layers ${(over.reduce((a, b) => a + b, 0) / over.length).toFixed(2)}. ` +
        "Max violation is the busiest expert's load over the mean load, minus 1: 0 is perfect balance.";
    };
    slider.addEventListener("input", show);
    show();
    const thinned = router.total > router.steps.length ? `, ${router.steps.length} of ${router.total} snapshots kept` : "";
    return el("section", { class: "card" }, el("h3", {}, "Expert load ", el("span", { class: "muted small" }, `${count(router.layers.length, "MoE layer")} × ${count(width, "expert")}${thinned}`)),
      el("div", { class: `grid experts${width > 32 ? " wide" : ""}` }, left, right));
  }

  function samples(stage) {
    if (!stage.samples.length) return null;
    const capped = stage.samples_total > stage.samples.length ? `the latest ${stage.samples.length} of ${stage.samples_total.toLocaleString("en-US")}` : "latest steps first";
    const card = el("section", { class: "card" }, el("h3", {}, "Sampled answers ", el("span", { class: "muted small" }, capped)));
    sampleTable(card, stage.samples, { score: "Reward", steps: true });
    return card;
  }

  function evaluations(stage) {
    const shown = stage.evaluations.filter((one) => one.samples.length);
    if (!shown.length) return null;
    const details = collapsible("Evaluation samples", shown.map((one) => one.checkpoint).join(", "));
    const holder = el("div");
    const draw = (one) => {
      const measured = Object.entries(one.metrics).map(([name, value]) => `${name.replaceAll("_", " ")} ${format(value, /exact_match|rate/.test(name))}`);
      const about = [known(one.num_prompts) && count(one.num_prompts, "prompt"), one.data, one.scorer && `scored by ${one.scorer}`, ...measured,
        one.total > one.samples.length && `first ${one.samples.length} of ${count(one.total, "sample")}`];
      holder.replaceChildren(el("p", { class: "muted small" }, about.filter(Boolean).join(" · ")));
      sampleTable(holder, one.samples, { score: "Score", steps: false });
    };
    if (shown.length > 1) {
      const select = el("select", {}, ...shown.map((one, i) => el("option", { value: i }, one.label ? `${one.label}: ${one.checkpoint}` : one.checkpoint)));
      select.addEventListener("change", () => draw(shown[+select.value]));
      details.append(el("label", { class: "tools" }, "Checkpoint", select));
    }
    details.append(holder);
    draw(shown[0]);
    return details;
  }

  function collapsible(title, note) {
    return el("details", { class: "card" }, el("summary", {}, `${title} `, note ? el("span", { class: "muted" }, note) : null));
  }

  function allMetrics(stage) {
    if (!stage.groups.length) return null;
    const total = stage.groups.reduce((sum, group) => sum + group.names.length, 0);
    const details = collapsible("All metrics", `${total} more, by name`);
    for (const group of stage.groups) {
      const grid = el("div", { class: "grid all" });
      details.append(el("h3", {}, group.title), grid);
      for (const series of pick(stage, group.names)) {
        const latest = series.values.filter(known).slice(-1)[0];
        const cell = el("div", {}, el("div", { class: "mini" }, series.name, el("span", { class: "num" }, format(latest))));
        grid.append(cell);
        Charts.lineChart(cell, { series: [series], label: series.name, height: 130 });
      }
    }
    return details;
  }

  function recipe(stage) {
    const entries = Object.entries(stage.recipe);
    if (!entries.length) return null;
    const isGroup = ([, value]) => known(value) && typeof value === "object" && !Array.isArray(value);
    const plain = entries.filter((entry) => !isGroup(entry));
    const groups = [...(plain.length ? [["", Object.fromEntries(plain)]] : []), ...entries.filter(isGroup)];
    const list = el("div", { class: "recipe" }, ...groups.map(([name, values]) =>
      el("section", {}, name ? el("h4", {}, name) : null, el("dl", {}, ...flatten(values).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value)))))));
    const details = collapsible("Recipe", stage.recipe_hash ? `hash ${stage.recipe_hash.slice(0, 12)}` : "");
    details.append(list);
    return details;
  }

  function flatten(values, prefix = "") {
    return Object.entries(values).flatMap(([key, value]) => {
      if (known(value) && typeof value === "object" && !Array.isArray(value)) return flatten(value, `${prefix}${key}.`);
      const text = Array.isArray(value) ? value.map((item) => (typeof item === "object" ? JSON.stringify(item) : String(item))).join(", ") || "none" : known(value) ? String(value) : "none";
      return [[prefix + key, text]];
    });
  }

  // ---- sampled answers --------------------------------------------------------------------------------------------
  function sampleTable(host, rows, { score, steps }) {
    const rewards = rows.map((row) => row.reward).filter(known);
    const range = [Math.min(0, ...rewards), Math.max(1, ...rewards)];
    const text = el("input", { type: "search", placeholder: "Filter by text", "aria-label": "Filter by text" });
    const low = el("input", { type: "number", step: "any", "aria-label": `lowest ${score.toLowerCase()} shown` });
    const high = el("input", { type: "number", step: "any", "aria-label": `highest ${score.toLowerCase()} shown` });
    const order = el("select", { "aria-label": "order" }, ...[["", steps ? "latest first" : "as evaluated"], ["high", `highest ${score.toLowerCase()}`], ["low", `lowest ${score.toLowerCase()}`]]
      .map(([value, name]) => el("option", { value }, name)));
    const said = el("span", { class: "num", role: "status" });
    const body = el("tbody");
    const more = el("button", { class: "more", type: "button" }, `Show ${PAGE_ROWS} more`);
    const names = [...(steps ? ["Step"] : []), score, "Prompt", "Response", "Answer", "Finish"];
    const columns = names.map((name) => el("col", { class: { Prompt: "wide", Response: "wider" }[name] }));
    host.append(el("div", { class: "tools" }, text, el("label", {}, `${score} from `, low), el("label", {}, "to ", high), order, said),
      el("div", { class: "scroll samples" }, el("table", {}, el("colgroup", {}, ...columns), el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)))), body)), more);
    let limit = PAGE_ROWS;
    const draw = () => {
      const found = order_by(order.value, rows.filter((row) => matches(row, text.value.toLowerCase(), low.value, high.value)));
      body.replaceChildren(...found.slice(0, limit).map((row) => sampleRow(row, names, range)));
      if (!found.length) body.append(el("tr", {}, el("td", { class: "empty", colspan: names.length }, "No sample matches.")));
      said.textContent = `${Math.min(limit, found.length)} of ${found.length}${found.length < rows.length ? ` (filtered from ${rows.length})` : ""}`;
      more.hidden = found.length <= limit;
    };
    for (const control of [text, low, high, order]) control.addEventListener("input", () => { limit = PAGE_ROWS; draw(); });
    more.addEventListener("click", () => { limit += PAGE_ROWS; draw(); });
    draw();
  }

  function matches(row, text, low, high) {
    if (text && ![row.prompt, row.response, row.answer, row.finish_reason].some((part) => part.toLowerCase().includes(text))) return false;
    if (low === "" && high === "") return true;
    return known(row.reward) && (low === "" || row.reward >= +low) && (high === "" || row.reward <= +high);
  }

  function order_by(order, rows) {
    if (!order) return rows;
    const sign = order === "high" ? -1 : 1;
    return [...rows].sort((a, b) => sign * ((a.reward ?? sign * Infinity) - (b.reward ?? sign * Infinity)) || 0);
  }

  function sampleRow(row, names, [low, high]) {
    const hue = known(row.reward) ? 8 + 132 * ((row.reward - low) / (high - low)) : null;
    const tint = hue === null ? {} : { background: `hsl(${hue} 70% 50% / .2)`, borderColor: `hsl(${hue} 60% 45% / .6)` };
    const parts = Object.entries(row.rewards).map(([name, value]) => el("span", { class: "part" }, `${name} ${format(value)}`));
    const pill = el("span", { class: "pill", style: tint }, format(row.reward));
    const cells = {
      Step: () => [known(row.step) ? row.step.toLocaleString("en-US") : "–"],
      Reward: () => [pill, ...parts], Score: () => [pill, ...parts],
      Prompt: () => [el("div", { class: "text" }, row.prompt)], Response: () => [el("div", { class: "text" }, row.response)],
      Answer: () => [row.answer || "–"], Finish: () => [row.finish_reason || "–"],
    };
    return el("tr", { class: "sample" }, ...names.map((name) => el("td", { "data-label": name }, ...cells[name]())));
  }

  // ---- the page ---------------------------------------------------------------------------------------------------
  function navigation() {
    const nav = document.getElementById("nav");
    nav.append(el("a", { href: "#page" }, "Summary"), ...(data.stages.length > 1 ? data.stages : []).map((stage) => el("a", { href: `#${anchor(stage)}` }, stage.name)));
    const links = [...nav.children];
    const spy = () => {
      const passed = data.stages.filter((stage) => document.getElementById(anchor(stage)).getBoundingClientRect().top < innerHeight * 0.4).length;
      links.forEach((link, i) => link.setAttribute("aria-current", i === passed));
    };
    addEventListener("scroll", spy, { passive: true });
    spy();
  }

  const openAll = () => document.querySelectorAll("details").forEach((details) => { details.open = true; });

  section(page, header);
  section(page, notices);
  section(page, summary);
  for (const stage of data.stages) section(page, () => stageSection(stage));
  page.append(el("footer", {}, "Written by dots_align. This file needs no network; add #all to its address to open every section."));
  navigation();
  document.getElementById("smoothing").addEventListener("change", (event) => Charts.smooth(+event.target.value));
  addEventListener("beforeprint", openAll);
  if (location.hash === "#all") openAll();
  root.dataset.ready = "true";
})();
