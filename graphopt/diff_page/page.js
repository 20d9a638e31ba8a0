// The summary above the graphs, the controls, and what mouse and keys do.

function tile(value, label, title) {
  return element("div", { class: "tile", title }, element("b", {}, value), element("span", {}, label));
}

const bytes = (count) => (count >= 1e9 ? `${(count / 1e9).toFixed(2)} GB` : count >= 1e6 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e3).toFixed(1)} kB`);
const arrow = (before, after) => (before === after ? before : `${before} → ${after}`);

function drawSummary() {
  const [a, b] = [data.a, data.b];
  const rewrites = data.passes.reduce((sum, item) => sum + item.rewrites, 0);
  const back = data.passes.reduce((sum, item) => sum + item.rolled_back + item.slower, 0);
  const errors = data.passes.map((item) => item.error).filter((error) => error !== null);
  const count = (value) => value.toLocaleString("en");
  byId("summary").replaceChildren(...[
    tile(arrow(a.title, b.title), a.title === b.title ? "model" : "A and B"),
    tile(arrow(count(a.count), count(b.count)), "nodes that compute"),
    a.parameters.elements + b.parameters.elements > 0 && tile(arrow(count(a.parameters.elements), count(b.parameters.elements)), "parameters"),
    a.parameters.bytes + b.parameters.bytes > 0 && tile(arrow(bytes(a.parameters.bytes), bytes(b.parameters.bytes)), "of weights"),
    data.passes.length && tile(count(rewrites), back ? `rewrites, ${back} taken back` : "rewrites"),
    errors.length && tile(relative(Math.max(...errors)), "largest error after a pass"),
    data.outputs.length && tile(data.outputs.every((row) => row.within) ? "agree" : "differ", "outputs"),
  ].filter(Boolean));
  byId("tables").replaceChildren(...[
    details("operators", operatorTable()),
    data.passes.length && details("passes", passTable()),
    ...data.passes.filter((item) => item.trade_offs.length).map((item) => details(`chart of ${item.name}`, charts(item))),
    data.outputs.length && details("outputs", outputTable()),
  ].filter(Boolean));
  byId("head-a").textContent = `A  ${a.title}`;
  byId("head-b").textContent = `B  ${b.title}`;
}

function details(title, content) {
  return element("details", { name: "tables", ontoggle: () => { arrange(); } }, element("summary", {}, title), content);
}

function table(columns, rows) {
  const head = element("tr", {}, ...columns.map((name) => element("th", {}, name)));
  const line = (cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell ?? ""))));
  return element("div", { class: "table" }, element("table", {}, head, ...rows.map(line)));
}

function operatorTable() {
  const names = [...new Set([...Object.keys(data.a.operators), ...Object.keys(data.b.operators)])];
  const rows = names.map((name) => [name, data.a.operators[name] || 0, data.b.operators[name] || 0]);
  rows.sort((x, y) => Math.abs(y[2] - y[1]) - Math.abs(x[2] - x[1]) || y[1] - x[1] || (x[0] < y[0] ? -1 : 1));
  const signed = (change) => (change ? `${change > 0 ? "+" : "−"}${Math.abs(change)}` : "");
  return table(["operator", "A", "B", ""], rows.map(([name, a, b]) => [name, a, b, signed(b - a)]));
}

function passTable() {
  return table(["pass", "rewrites", "declined", "rolled back", "slower", "nodes", "error", "seconds"],
    data.passes.map((item) => [item.name, item.rewrites, item.declined, item.rolled_back, item.slower,
      arrow(item.nodes_before, item.nodes_after),
      item.error === null ? "" : relative(item.error), item.seconds.toFixed(2)]));
}

function outputTable() {
  const number = (value) => (value === null ? "" : value.toPrecision(3));
  return table(["output", "largest difference", "relative", "cosine", "within tolerance"], data.outputs.map((row) =>
    [row.output, number(row.max_abs), number(row.max_rel), number(row.cosine), row.within ? "yes" : "no"]));
}

// Places where something differs, one for each stretch of rows that do.
const stops = data.rows.map((_, row) => row).filter((row) => !equal[row] && (row === 0 || equal[row - 1]));

function nextChange(by) {
  const here = view.selected ? data[view.selected.key].row[view.selected.place] : topRow();
  const row = by > 0 ? stops.find((stop) => stop > here) : stops.findLast((stop) => stop < here);
  if (row === undefined) return;
  const [a, b] = data.rows[row];
  select(a === null ? "b" : "a", a ?? b);
}

function topRow() {
  const line = lines[Math.floor(byId("scroller").scrollTop / HEIGHT)];
  return line === undefined || byId("scroller").scrollTop === 0 ? -1 : line.row ?? line.from ?? -1;
}

function move(by, across) {
  if (!view.selected) return;
  const { key, place } = view.selected;
  if (across) {
    const partner = data[key].nodes[place].partners?.[0];
    if (partner !== undefined && key !== across) select(across, data[across].place.get(partner));
    return;
  }
  const column = key === "a" ? 0 : 1;
  for (let line = lineOf[data[key].row[place]] + by; line >= 0 && line < lines.length; line += by) {
    const next = lines[line].row === undefined ? null : data.rows[lines[line].row][column];
    if (next !== null) return select(key, next);
  }
}

const KEYS = {
  "/": () => byId("search").select(), n: () => nextChange(1), p: () => nextChange(-1), Escape: deselect,
  ArrowDown: () => move(1), ArrowUp: () => move(-1), ArrowLeft: () => move(0, "a"), ArrowRight: () => move(0, "b"),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === byId("search")) {
    if (event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") byId("scroller").focus();
    return;
  }
  if (event.target instanceof HTMLSelectElement || !KEYS[event.key]) return;
  if (event.key.startsWith("Arrow") && !view.selected) return;
  event.preventDefault();
  KEYS[event.key]();
}

function connect() {
  for (const colour of Object.keys(FIELDS)) {
    if (scales[FIELDS[colour]]) byId("colour").append(element("option", { value: colour }, colour));
  }
  byId("colour").addEventListener("change", (event) => {
    view.colour = event.target.value;
    drawLegend();
    arrange();
  });
  byId("weights").addEventListener("change", (event) => { view.weights = event.target.checked; arrange(); });
  byId("fold").addEventListener("change", (event) => {
    view.fold = event.target.checked;
    view.opened.clear();
    arrange();
  });
  byId("search").addEventListener("input", (event) => search(event.target.value));
  byId("next").addEventListener("click", () => nextChange(1));
  byId("previous").addEventListener("click", () => nextChange(-1));
  byId("changes").textContent = `${stops.length} ${stops.length === 1 ? "place differs" : "places differ"}`;
  byId("window").addEventListener("click", (event) => {
    const cell = event.target.closest("[data-place]");
    if (cell) select(cell.dataset.side, Number(cell.dataset.place));
  });
  let waiting = false;
  byId("scroller").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  });
  byId("overview").addEventListener("click", (event) => {
    const scroller = byId("scroller");
    scroller.scrollTop = (event.offsetY / event.target.clientHeight) * lines.length * HEIGHT - scroller.clientHeight / 2;
  });
  new ResizeObserver(() => { draw(); drawOverview(); }).observe(byId("scroller"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);
  document.addEventListener("keydown", onKey);
}

drawSummary();
connect();
drawLegend();
arrange();
