// The page of `dots-align experts`: which experts each domain uses, and how that changes from checkpoint to checkpoint.
(() => {
  const { el, section, segmented, known, count, colour, format, tipRow, whole } = Base;
  const { experts: found, generated } = Base.data();
  const { layers, num_experts: width, domains, checkpoints, change } = found;
  const page = document.getElementById("page"), names = domains.map((domain) => domain.name);
  const last = checkpoints[checkpoints.length - 1], many = checkpoints.length > 1;
  const rows = layers.map((layer) => `layer ${layer}`), columns = Array.from({ length: width }, (_, i) => String(i));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const pick = (label, options, onchange) => el("select", { "aria-label": label, onchange: (event) => onchange(+event.target.value) }, options.map((name, i) => el("option", { value: i }, name)));
  const byLayer = (tables) => Object.entries(tables).map(([name, values]) => ({ name, steps: layers, values }));

  // ---- the top ----------------------------------------------------------------------------------------------------
  function headline() {
    const violation = Math.max(...names.flatMap((name) => last.max_violation[name]));
    const tiles = [["MoE layers", whole(layers.length)], ["experts", `${whole(width)}`, `${found.experts_per_token} a token`], ["max violation", violation.toFixed(2), "busiest expert over the mean, minus 1"],
      names.length > 1 && ["domains apart", format(mean(last.divergence), true), "0: the same experts, 100%: no expert shared"], ...domains.map((domain) => [domain.name, whole(domain.tokens), "tokens"])].filter(Boolean);
    return el("header", { class: "hero" }, el("div", { class: "verdict" }, el("p", { class: "eyebrow" }, el("i", { class: "light" }), el("b", {}, many ? `${checkpoints[0].name} → ${last.name}` : last.name), el("span", { class: "mono" }, last.path)), el("h1", {}, found.verdict)),
      el("div", { class: "card tiles" }, tiles.map(([name, value, note]) => el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), el("span", { class: "note", title: note }, note || "")))));
  }

  // ---- load -------------------------------------------------------------------------------------------------------
  function loads() {
    let at = checkpoints.length - 1, shown = 0, against = -1;
    const share = (i, j) => checkpoints[at].load[names[shown]][i][j], other = (i, j) => checkpoints[at].load[names[against]][i][j];
    const violation = (i) => checkpoints[at].max_violation[names[shown]][i];
    const box = el("section", { class: "card", "aria-label": "Expert load" }), map = el("div"), says = () => `${names[shown]}${against < 0 ? "" : ` against ${names[against]}`}, ${checkpoints[at].name}`;
    const tip = (i, j) => [el("div", { class: "muted" }, `${rows[i]}, expert ${j}`), tipRow(null, names[shown], `${(share(i, j) * width).toFixed(2)}×`), ...names.filter((name) => name !== names[shown]).map((name) => tipRow(null, name, `${(checkpoints[at].load[name][i][j] * width).toFixed(2)}×`))];
    const value = (i, j) => (against < 0 ? share(i, j) * width : (share(i, j) + 0.02 / width) / (other(i, j) + 0.02 / width));
    const controls = [pick("domain", names, (i) => { shown = i; view.redraw(); }), names.length > 1 ? pick("compared with", ["its fair share", ...names.map((name) => `against ${name}`)], (i) => { against = i - 1; view.redraw(); }) : null,
      many ? pick("checkpoint", checkpoints.map((one) => one.name), (i) => { at = i; view.redraw(); }) : null];
    const select = controls[2];
    if (select) select.value = String(at);
    box.append(el("header", {}, el("h3", {}, "Load of each expert"), controls, el("span", { class: "muted small" }, "as a multiple of its fair share")), map);
    const view = Heat.map(map, { rows, columns, corner: "expert", at: value, tip, side: { title: "violation", text: (i) => violation(i).toFixed(2), bar: (i) => violation(i) / 4 },
      label: () => `Expert load of ${says()}. Max violation: ${layers.map((layer, i) => `layer ${layer} ${violation(i).toFixed(2)}`).join(", ")}` });
    return box;
  }

  function byLayerCharts() {
    const grid = el("div", { class: "grid curves" }), span = new Charts.Span();
    const card = (title, note, series, scale) => grid.append(Charts.card({ title, note, series, scale, span, unit: "layer" }));
    card("Max violation", "by layer", byLayer(last.max_violation));
    card("Entropy of the load", "by layer, 1 = even", byLayer(last.entropy));
    if (names.length > 1) card("Domains apart", "by layer", byLayer({ divergence: last.divergence }), "percent");
    return grid;
  }

  function specialists() {
    if (!last.specialists.length) return null;
    const most = Math.max(...last.specialists.flatMap((one) => one.loads));
    const bars = (one) => el("td", { class: "loads" }, one.loads.map((load, i) => el("i", { style: { width: `${Math.max(2, 64 * load / most)}px`, background: colour(i) }, title: `${names[i]}: ${load.toFixed(2)}` })));
    return el("section", { class: "card", "aria-label": "Specialists" }, el("header", {}, el("h3", {}, "Specialists"), el("span", { class: "muted small" }, "the experts that tell the domains apart best; loads as multiples of the fair share")),
      el("div", { class: "legend" }, names.map((name, i) => el("span", {}, el("i", { style: { background: colour(i) } }), name))),
      el("div", { class: "scroll" }, el("table", { id: "specialists" }, el("thead", {}, el("tr", {}, ["layer", "expert", "domain"].map((name) => el("th", { scope: "col" }, name)), ["load there", "elsewhere"].map((name) => el("th", { scope: "col", class: "num" }, name)), el("th", { scope: "col" }, "in every domain"))),
        el("tbody", {}, last.specialists.map((one) => el("tr", {}, el("td", {}, one.layer), el("td", {}, one.expert), el("td", {}, el("b", {}, one.domain)), el("td", { class: "num" }, `${one.load.toFixed(2)}×`), el("td", { class: "num" }, `${one.elsewhere.toFixed(2)}×`), bars(one)))))));
  }

  function similarity() {
    if (names.length < 3) return null;
    const box = el("section", { class: "card", "aria-label": "Similarity of domains" }, el("header", {}, el("h3", {}, "Similarity of domains"), el("span", { class: "muted small" }, "1 minus the divergence of each pair")));
    Heat.map(box, { rows: names, columns: names, scale: "share", at: (i, j) => last.similarity[i][j], label: "How alike domains are routed", tip: (i, j) => [tipRow(null, `${names[i]} and ${names[j]}`, format(last.similarity[i][j], true))] });
    return box;
  }

  // ---- checkpoints ------------------------------------------------------------------------------------------------
  function series() {
    if (!many) return null;
    const steps = checkpoints.map((one, i) => i), named = (i) => checkpoints[i]?.name ?? "";
    const curve = (name, values) => ({ name, steps: steps.filter((i) => known(values[i])), values: values.filter(known) });
    const shift = (which) => names.map((name) => curve(name, checkpoints.map((one) => { const found = one.shifts[which === "first" ? 0 : one.shifts.length - 1]; return found ? mean(found.shift[name]) : null; })));
    const grid = el("div", { class: "grid curves" }), span = new Charts.Span();
    const card = (title, note, series, scale) => grid.append(Charts.card({ title, note, series, scale, span, unit: "checkpoint", naming: named }));
    card("Max violation", "worst layer", names.map((name) => curve(name, checkpoints.map((one) => Math.max(...one.max_violation[name])))));
    card("Router shift from the first", "share of choices that differ", shift("first"), "percent");
    if (checkpoints.length > 2) card("Router shift from the previous", "share of choices that differ", shift("previous"), "percent");
    if (names.length > 1) card("Domains apart", "mean of layers", [curve("divergence", checkpoints.map((one) => mean(one.divergence)))], "percent");
    return el("section", { class: "stage" }, el("div", { class: "stage-head" }, el("h2", {}, "From checkpoint to checkpoint"), el("span", { class: "muted small" }, checkpoints.map((one, i) => `${i}: ${one.name}`).join("  ·  "))), grid);
  }

  function changes() {
    if (!many) return null;
    const grid = el("div", { class: "grid curves" }), compared = last.shifts[0];
    grid.append(Charts.card({ title: "Router shift by layer", note: `${compared.from} → ${last.name}`, series: byLayer(compared.shift), scale: "percent", unit: "layer" }));
    if (!change) return grid;
    const kinds = [["experts", "weights"], ["router", "router rows"], ["bias", "routing bias"]];
    let kind = "experts";
    const most = () => Math.max(1e-12, ...change[kind].flat().map(Math.abs));
    const box = el("section", { class: "card", "aria-label": "Weight change" }), views = segmented("what changed", kinds, (value) => { kind = value; view.redraw(); });
    box.append(el("header", {}, el("h3", {}, "Change of each expert"), views, el("span", { class: "muted small" }, "norm of the difference over the norm; the bias as it moved")));
    const view = Heat.map(box, { rows, columns, corner: "expert", scale: "change", at: (i, j) => change[kind][i][j] / most(), label: () => `Change of ${kind} of each expert, at most ${format(most())}`,
      tip: (i, j) => [el("div", { class: "muted" }, `${rows[i]}, expert ${j}`), ...kinds.map(([name, title]) => tipRow(null, title, format(change[name][i][j], name !== "bias")))],
      side: { title: "mean", text: (i) => format(mean(change[kind][i].map(Math.abs)), kind !== "bias"), bar: (i) => mean(change[kind][i].map(Math.abs)) / most() } });
    return el("div", { class: "grid" }, box, grid);
  }

  document.querySelector(".smooth").hidden = true;
  for (const build of [headline, loads, byLayerCharts, specialists, similarity, series, changes]) section(page, build);
  document.getElementById("nav").append(el("span", { class: "muted" }, `${count(domains.length, "domain")} through ${count(checkpoints.length, "checkpoint")}`));
  page.append(el("footer", {}, `Written by dots_align on ${generated.replace("T", " ").replace("Z", " UTC")}. This file needs no network; the same figures are in the JSON file beside it.`));
  requestAnimationFrame(() => { document.documentElement.dataset.ready = "true"; });
})();
