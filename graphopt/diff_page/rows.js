// The two columns: only the lines in sight are elements, and one drawing holds the edges between them.

const HEIGHT = 24;
const GAP = 56; // between the columns, where replaced nodes are joined
const CONTEXT = 2; // equal rows kept on both sides of what differs
const SHORTEST = 4; // runs of fewer equal rows stay as they are
const DOT = 3.5;
const KINDS_SAID = new Set(["input", "output", "sub-graph"]); // a weight has a square dot

const view = { colour: "change", hidden: new Set(), weights: true, fold: true, opened: new Set(), selected: null, matches: [] };
let lines = []; // { row } | { from, to } of a folded run | { section }
let lineOf = []; // of each row; -1 where a filter hides it

function isHidden(row) {
  const nodes = SIDES.map((key) => nodeAt(row, key)).filter(Boolean);
  return nodes.every((node) => view.hidden.has(node.state) || (!view.weights && node.kind === "weight"));
}

function arrange() {
  lines = [];
  lineOf = new Array(data.rows.length).fill(-1);
  for (const section of data.sections) {
    if (data.sections.length > 1) lines.push({ section });
    let row = section.start;
    while (row < section.end) {
      const end = endOfRun(row, section.end);
      const [from, to] = [row + CONTEXT, end - CONTEXT];
      if (view.fold && to - from >= SHORTEST && !view.opened.has(from)) {
        addRows(row, from);
        lineOf.fill(lines.length, from, to);
        lines.push({ from, to });
        addRows(to, end);
        row = end;
      } else {
        addRows(row, Math.max(end, row + 1));
        row = Math.max(end, row + 1);
      }
    }
  }
  byId("space").style.height = `${lines.length * HEIGHT}px`;
  draw();
  drawOverview();
}

function endOfRun(row, limit) {
  while (row < limit && equal[row]) row++;
  return row;
}

function addRows(from, to) {
  for (let row = from; row < to; row++) {
    if (isHidden(row)) continue;
    lineOf[row] = lines.length;
    lines.push({ row });
  }
}

// Unfold and unhide what keeps a row from being seen.
function reveal(row) {
  if (lineOf[row] >= 0 && lines[lineOf[row]].row === row) return;
  const folded = lines[lineOf[row]];
  if (folded) view.opened.add(folded.from);
  else {
    view.hidden.clear();
    view.weights = byId("weights").checked = true;
    drawLegend();
  }
  arrange();
  if (!folded) reveal(row);
}

function goTo(row) {
  reveal(row);
  const scroller = byId("scroller");
  const top = lineOf[row] * HEIGHT;
  if (top < scroller.scrollTop + HEIGHT || top > scroller.scrollTop + scroller.clientHeight - 2 * HEIGHT) {
    scroller.scrollTop = Math.max(0, top - scroller.clientHeight / 2);
  }
  draw();
}

function draw() {
  const scroller = byId("scroller");
  const first = Math.max(0, Math.floor(scroller.scrollTop / HEIGHT) - 4);
  const last = Math.min(lines.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / HEIGHT) + 4);
  const shown = byId("window");
  shown.style.transform = `translateY(${first * HEIGHT}px)`;
  shown.replaceChildren(...lines.slice(first, last).map(drawLine));
  drawEdges(first, last);
  const overview = byId("overview");
  overview.style.setProperty("--top", `${(100 * scroller.scrollTop) / Math.max(1, lines.length * HEIGHT)}%`);
}

function drawLine(line) {
  if (line.section) {
    const label = line.section.graph === "" ? "main graph" : `sub-graph ${line.section.graph}`;
    return element("div", { class: "line section" }, label);
  }
  if (line.row === undefined) return drawRun(line);
  const matched = (key, place) => view.matchSet?.has(`${key}${place}`);
  return element("div", { class: "line", role: "listitem" }, ...SIDES.map((key, column) => {
    const place = data.rows[line.row][column];
    return place === null ? element("div", { class: "cell empty" }) : drawCell(key, place, matched(key, place));
  }));
}

function drawCell(key, place, isMatch) {
  const node = data[key].nodes[place];
  const chosen = view.selected && view.selected.key === key && view.selected.place === place;
  const classes = ["cell", tint(node, view.colour), node.kind === "weight" && "weight", isMatch && "match", chosen && "selected"];
  const operator = node.kind === "call" ? short(node.operator) : node.name;
  const value = view.colour === "change" ? undefined : node[FIELDS[view.colour]];
  return element("div", {
    class: classes.filter(Boolean).join(" "), "data-side": key, "data-place": place,
    style: `padding-left:${data[key].width}px`, title: [node.module, node.source].filter(Boolean).join("\n") || undefined,
  },
    element("b", { class: "mark" }, node.state === "same" ? "" : STATES[node.state]),
    element("span", { class: "name" }, node.name),
    element("span", { class: "operator" }, KINDS_SAID.has(node.kind) ? node.kind : node.name.startsWith(operator) ? "" : operator),
    element("span", { class: value === undefined ? "type" : "value" },
      value === undefined ? node.type || "" : SHOW[view.colour](value)));
}

function drawRun(run) {
  const modules = new Set();
  const kernels = new Set();
  for (let row = run.from; row < run.to; row++) {
    const node = nodeAt(row, "b");
    if (node.module) modules.add(node.module);
    for (const kernel of node.kernels || []) kernels.add(kernel);
  }
  const time = [...kernels].reduce((sum, kernel) => sum + data.kernels[kernel].seconds, 0);
  const words = [`… ${run.to - run.from} equal nodes`, commonStart([...modules])];
  if (view.colour === "time" && time) words.push(seconds(time));
  return element("button", { class: "line run", "data-from": run.from, style: `padding-left:${data.a.width + 18}px`, onclick: () => open(run) },
    words.filter(Boolean).join("  ·  "));
}

function open(run) {
  view.opened.add(run.from);
  arrange();
}

// The modules that all of these paths lie in: "encoder.layer.0" for "encoder.layer.0.norm" and "encoder.layer.0.dense".
function commonStart(paths) {
  if (!paths.length) return "";
  const parts = paths[0].split(".");
  let length = parts.length;
  for (const path of paths) {
    const words = path.split(".");
    length = Math.min(length, words.length);
    for (let i = 0; i < length; i++) if (words[i] !== parts[i]) length = i;
  }
  return parts.slice(0, length).join(".");
}
