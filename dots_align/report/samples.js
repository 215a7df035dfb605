// The browser of samples: a list of any length of which only what is in view exists, and beside it the one that is chosen.
const Samples = (() => {
  const { el, known, clamp, whole, count, format, segmented, showTip, hideTip, tipRow, jsonOf, fail } = Base;
  const ROW = 58;         // pixels of a row; the style sheet says the same
  const MAX_SHOWN = 3000; // tokens of one answer, until more are asked for
  const ORDERS = [["new", "latest first"], ["old", "earliest first"], ["high", "highest reward"], ["low", "lowest reward"], ["long", "longest"], ["short", "shortest"]];

  // ---- the data ---------------------------------------------------------------------------------------------------
  // All chunks of a set, unpacked one after the other with pauses for whatever else the page has to do.
  class Store {
    constructor(set) {
      this.set = set;
      this.rows = [];
      this.tokens = new Map();
    }

    async load(onprogress) {
      for (const [index, [columns]] of this.set.chunks.entries()) {
        this.add(index, await jsonOf(columns));
        onprogress();
        await new Promise((resolve) => setTimeout(resolve));
      }
    }

    add(chunk, columns) {
      columns.step.forEach((step, i) => this.rows.push({
        chunk, i, step, prompt: columns.prompts[columns.prompt[i]], response: columns.response[i], answer: columns.answer[i],
        finish: columns.finish_reason[i], reward: columns.reward[i], length: columns.length[i], parts: columns.parts.map((part) => part[i]), hay: null,
      }));
    }

    // [texts, log-probs, advantages] of a row, or null where they are not on the page.
    async tokensOf(row) {
      const name = this.set.chunks[row.chunk][1];
      if (!name) return null;
      if (!this.tokens.has(row.chunk)) this.tokens.set(row.chunk, jsonOf(name));
      return (await this.tokens.get(row.chunk))[row.i] || null;
    }
  }

  // A row's text in lower case, made when the first search wants it.
  const hay = (row) => (row.hay ??= `${row.prompt}\n${row.response}\n${row.answer}`.toLowerCase());

  // Words, or phrases "in quotes", all of which have to occur.
  const wanted = (text) => [...text.toLowerCase().matchAll(/"([^"]+)"?|[^\s"]+/g)].map((match) => match[1] ?? match[0]);

  function matching(rows, { text, low, high, finish, zoom, part }) {
    const needles = wanted(text);
    const value = part < 0 ? (row) => row.reward : (row) => row.parts[part];
    const bounded = low !== "" || high !== "";
    return rows.filter((row) => (!zoom || row.step === null || (row.step >= zoom[0] && row.step <= zoom[1]))
      && (!finish || row.finish === finish)
      && (!bounded || (known(value(row)) && (low === "" || value(row) >= +low) && (high === "" || value(row) <= +high)))
      && needles.every((needle) => hay(row).includes(needle)));
  }

  function ordered(rows, order) {
    const by = { high: ["reward", -1], low: ["reward", 1], long: ["length", -1], short: ["length", 1] }[order];
    if (order === "old") return rows.reverse();
    if (!by) return rows;
    const [key, sign] = by, last = sign * Infinity;
    const of = key === "length" ? (row) => row.length ?? row.response.length : (row) => row.reward;
    return rows.sort((a, b) => sign * ((of(a) ?? last) - (of(b) ?? last)) || 0);
  }

  // ---- the list ---------------------------------------------------------------------------------------------------
  let lists = 0;

  function virtualList(onchoose, rowOf) {
    const inner = el("div", { class: "rows" }), name = `list-${++lists}`;
    const host = el("div", { class: "list", id: name, role: "listbox", tabindex: 0, "aria-label": "samples" }, inner);
    const state = { rows: [], at: -1 };
    const draw = () => {
      const first = Math.max(0, Math.floor(host.scrollTop / ROW) - 4), end = Math.min(state.rows.length, first + Math.ceil((host.clientHeight || 520) / ROW) + 8);
      inner.style.height = `${state.rows.length * ROW}px`;
      inner.replaceChildren(...Array.from({ length: end - first }, (_, k) => {
        const index = first + k, node = rowOf(state.rows[index]);
        for (const [key, value] of Object.entries({ role: "option", id: `${name}-${index}`, "aria-setsize": state.rows.length, "aria-posinset": index + 1, "aria-selected": index === state.at })) node.setAttribute(key, value);
        node.style.top = `${index * ROW}px`;
        node.addEventListener("click", () => choose(index));
        return node;
      }));
    };
    const choose = (index) => {
      if (!state.rows.length) { state.at = -1; draw(); onchoose(null); return; }
      state.at = clamp(index, 0, state.rows.length - 1);
      const top = state.at * ROW;
      if (top < host.scrollTop) host.scrollTop = top;
      else if (top + ROW > host.scrollTop + host.clientHeight) host.scrollTop = top + ROW - host.clientHeight;
      draw();
      host.setAttribute("aria-activedescendant", `${name}-${state.at}`);
      onchoose(state.rows[state.at]);
    };
    host.addEventListener("scroll", draw, { passive: true });
    new ResizeObserver(() => requestAnimationFrame(draw)).observe(host);
    host.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(host.clientHeight / ROW) - 1);
      const moves = { ArrowDown: state.at + 1, ArrowUp: state.at - 1, PageDown: state.at + page, PageUp: state.at - page, Home: 0, End: state.rows.length - 1 };
      if (event.key in moves) { event.preventDefault(); choose(moves[event.key]); }
    });
    return { host, choose, draw, show: (rows) => { state.rows = rows; host.scrollTop = 0; choose(0); } };
  }

  function tint(reward, [low, high]) {
    if (!known(reward)) return {};
    const share = high > low ? (reward - low) / (high - low) : 1;
    return { "--share": `${Math.round(100 * clamp(share, 0, 1))}%` };
  }

  const oneLine = (text, size) => (text.length > size ? `${text.slice(0, size)}…` : text).replace(/\s+/g, " ");

  function listRow(row, range) {
    return el("div", { class: "sample" }, el("span", { class: "pill", style: tint(row.reward, range) }, format(row.reward)),
      el("span", { class: "lines" }, el("span", { class: "q" }, oneLine(row.prompt, 160)), el("span", { class: "a" }, oneLine(row.response, 160) || "(empty)")),
      el("span", { class: "when muted" }, known(row.step) ? `step ${whole(row.step)}` : "", row.finish && row.finish !== "stop" ? el("em", {}, row.finish) : null));
  }

  // ---- the chosen one ---------------------------------------------------------------------------------------------
  function marked(text, needles) {
    if (!needles.length || text.length > 200000) return [text];
    const pattern = new RegExp(`(${needles.map((needle) => needle.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
    return text.split(pattern).map((piece, i) => (i % 2 ? el("mark", {}, piece) : piece));
  }

  function partBars(set, row) {
    if (!set.parts.length) return null;
    const most = Math.max(1, ...row.parts.filter(known).map(Math.abs));
    return el("dl", { class: "parts" }, set.parts.map((name, i) => el("div", {}, el("dt", {}, name), el("dd", {},
      el("i", { class: row.parts[i] < 0 ? "minus" : "plus", style: { width: `${100 * Math.abs(row.parts[i] ?? 0) / most}%` } }), el("b", {}, format(row.parts[i]))))));
  }

  function tokenView([texts, logprobs, advantages], mode) {
    const of = (list, i) => (list.length === 1 ? list[0] : list[i]);
    const most = Math.max(1e-6, ...advantages.map((value) => Math.abs(value ?? 0)));
    const spans = texts.slice(0, MAX_SHOWN).map((text, i) => {
      const value = mode === "advantage" ? (of(advantages, i) ?? 0) / most : Math.sqrt(clamp(-(logprobs[i] ?? 0) / 4, 0, 1));
      const side = mode === "advantage" ? (value < 0 ? "minus" : "plus") : "unsure";
      return el("span", { class: `token ${side}`, "data-i": i, style: { "--weight": `${Math.round(70 * Math.abs(value))}%` } }, text.replace(/\n/g, "↵\n"));
    });
    const box = el("div", { class: "text tokens", tabindex: 0, role: "group", "aria-label": `${count(texts.length, "token")}, coloured by ${mode}; arrow keys read them` }, spans);
    let at = -1;
    const read = (index, x, y) => {
      at = clamp(index, 0, spans.length - 1);
      box.querySelector(".token.at")?.classList.remove("at");
      spans[at].classList.add("at");
      const place = spans[at].getBoundingClientRect(), logprob = logprobs[at], advantage = of(advantages, at);
      showTip(x ?? place.left, y ?? place.top, el("div", { class: "muted" }, `token ${at + 1} of ${texts.length}: `, el("code", {}, JSON.stringify(texts[at]))),
        known(logprob) ? tipRow(null, "log-prob", `${format(logprob)} (${format(Math.exp(logprob), true)})`) : null, known(advantage) ? tipRow(null, "advantage", format(advantage)) : null);
    };
    box.addEventListener("pointermove", (event) => { const i = event.target.dataset?.i; if (i !== undefined) read(+i, event.clientX, event.clientY); });
    for (const name of ["pointerleave", "blur"]) box.addEventListener(name, () => { hideTip(); box.querySelector(".token.at")?.classList.remove("at"); });
    box.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (move) { event.preventDefault(); read(at + move); }
    });
    const hidden = texts.length - spans.length;
    return [box, hidden > 0 ? el("p", { class: "muted small" }, `${whole(hidden)} more tokens: see “text”.`) : null];
  }

  function detail(host, store, score) {
    let mode = "logprob", current = null, needles = [];
    const modes = segmented("colour tokens by", [["logprob", "log-prob"], ["advantage", "advantage"], ["text", "text"]], (value) => { mode = value; answer(); });
    const body = el("div", { class: "answer" }), key = el("p", { class: "muted small key" });
    async function answer() {
      const row = current;
      if (!row) return;
      const tokens = mode === "text" ? null : await store.tokensOf(row).catch((error) => { fail(error.message); return null; });
      if (row !== current) return;  // another one was chosen meanwhile
      const usable = tokens && (mode !== "advantage" || tokens[2].length);
      body.replaceChildren(...(usable ? tokenView(tokens, mode) : [el("div", { class: "text", tabindex: 0 }, marked(row.response, needles))]).filter(Boolean));
      key.textContent = usable ? { logprob: "The stronger the colour, the less likely the token was to the policy.", advantage: "Blue tokens are made likelier by this step, orange ones less likely." }[mode]
        : mode === "text" ? "" : tokens ? "No advantage: its group was not trained on." : "This sample's tokens are not on the page.";
    }
    return (row, text, range) => {
      current = row;
      needles = wanted(text);
      if (!row) { host.replaceChildren(el("p", { class: "empty" }, "No sample matches.")); return; }
      const facts = [known(row.step) && `step ${whole(row.step)}`, row.finish && (row.finish === "stop" ? "ended by itself" : `ended by ${row.finish}`), known(row.length) && count(row.length, "token")];
      host.replaceChildren(
        el("div", { class: "facts" }, el("span", { class: "pill big", style: tint(row.reward, range) }, format(row.reward)), el("span", { class: "muted" }, `${score} · ${facts.filter(Boolean).join(" · ")}`)),
        partBars(store.set, row) ?? "",
        el("h4", {}, "Prompt"), el("div", { class: "text prompt", tabindex: 0 }, marked(row.prompt, needles)),
        el("h4", { class: "with" }, "Answer", store.set.detailed ? modes : ""), body, key,
        row.answer ? el("h4", {}, "Reference") : "", row.answer ? el("div", { class: "text" }, marked(row.answer, needles)) : "");
      if (!store.set.detailed) mode = "text";
      answer();
    };
  }

  // ---- together ---------------------------------------------------------------------------------------------------
  function bounds(rows) {
    let [low, high] = [0, 1];
    for (const { reward } of rows) if (known(reward)) { low = Math.min(low, reward); high = Math.max(high, reward); }
    return [low, high];
  }

  function browser(host, set, span) {
    const store = new Store(set), score = set.score;
    const search = el("input", { type: "search", placeholder: "Search prompt, answer, reference: words, or \"a phrase\"", "aria-label": "search samples" });
    const low = el("input", { type: "number", step: "any", "aria-label": `lowest ${score} shown`, placeholder: "min" });
    const high = el("input", { type: "number", step: "any", "aria-label": `highest ${score} shown`, placeholder: "max" });
    const part = el("select", { "aria-label": "which reward the limits are for" }, [score, ...set.parts].map((name, i) => el("option", { value: i - 1 }, name)));
    const finish = el("select", { "aria-label": "how answers end" }, el("option", { value: "" }, "any ending"));
    const order = el("select", { "aria-label": "order" }, ORDERS.map(([value, name]) => el("option", { value }, name)));
    const said = el("span", { class: "num said", role: "status" }), chip = el("button", { type: "button", class: "chip", hidden: true, onclick: () => span.set(null) });
    const pane = el("div", { class: "pane" });
    let range = [0, 1];
    const show = detail(pane, store, score);
    const list = virtualList((row) => show(row, search.value, range), (row) => listRow(row, range));
    const draw = () => {
      const started = performance.now();
      const rows = ordered(matching(store.rows, { text: search.value, low: low.value, high: high.value, finish: finish.value, zoom: span.zoom, part: +part.value }), order.value);
      list.show(rows);
      said.textContent = `${whole(rows.length)} of ${whole(store.rows.length)}`;
      host.dataset.milliseconds = (performance.now() - started).toFixed(1);
      chip.hidden = !span.zoom;
      if (span.zoom) chip.textContent = `steps ${whole(span.zoom[0])}–${whole(span.zoom[1])} ✕`;
    };
    for (const control of [search, low, high, part, finish, order]) control.addEventListener("input", draw);
    span.watchers.push(() => { if (store.rows.length) draw(); });
    host.replaceChildren(
      el("div", { class: "tools", role: "search" }, search, el("span", { class: "pair" }, part, low, "to", high), finish, order, chip, said),
      el("div", { class: "browser" }, list.host, pane));
    return store.load(() => {
      range = bounds(store.rows);
      const endings = new Set([...finish.options].map((option) => option.value));
      for (const row of store.rows.slice(-4000)) if (row.finish && !endings.has(row.finish)) { endings.add(row.finish); finish.append(el("option", { value: row.finish }, row.finish)); }
      if (store.rows.length <= 4000 || store.set.chunks.length === 1) draw();
      else said.textContent = `unpacked ${whole(store.rows.length)} of ${whole(set.shown)}`;
    }).then(draw);
  }

  return { browser };
})();
