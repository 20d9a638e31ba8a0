// The lines between nodes: a value runs down its lane and turns off to each node that reads it.

const columnStart = { a: 0, b: 0 };

function measureColumns() {
  columnStart.b = (byId("space").clientWidth - GAP) / 2 + GAP;
}

function point(key, place) {
  const node = data[key].nodes[place];
  const lane = node.lane ?? (data[key].width - 22) / 9;
  return { x: columnStart[key] + 10 + 9 * lane, line: lineOf[data[key].row[place]] };
}

const middle = (line) => line * HEIGHT + HEIGHT / 2;

function edge(key, from, to, first, last) {
  const [start, end] = [point(key, from), point(key, to)];
  if (start.line < 0 || end.line < 0 || start.line === end.line || end.line < first || start.line > last) return "";
  const [top, bottom] = [middle(start.line), middle(end.line)];
  if (start.x === end.x) return `M${start.x} ${top}V${bottom}`;
  const turn = start.x < end.x ? 6 : -6;
  return `M${start.x} ${top}V${bottom - 6}Q${start.x} ${bottom} ${start.x + turn} ${bottom}H${end.x}`;
}

// From a node of A to what became of it in B, across the gap.
function join(a, b, first, last) {
  const [left, right] = [lineOf[data.a.row[a]], lineOf[data.b.row[b]]];
  if (left < 0 || right < 0 || Math.max(left, right) < first || Math.min(left, right) > last) return "";
  const [x, end] = [columnStart.b - GAP, columnStart.b];
  return `M${x} ${middle(left)}C${x + GAP / 2} ${middle(left)} ${x + GAP / 2} ${middle(right)} ${end} ${middle(right)}`;
}

function path(name, parts) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  made.setAttribute("class", name);
  made.setAttribute("d", parts.join(""));
  return made;
}

function drawEdges(first, last) {
  measureColumns();
  const groups = { edge: [], weak: [], join: [], chosen: [], joined: [] };
  const dots = { same: [], changed: [], removed: [], new: [] };
  for (const key of SIDES) {
    data[key].nodes.forEach((node, place) => {
      const at = point(key, place);
      const drawn = node.lane === undefined ? [] : data[key].readers[place];
      const kind = node.kind === "weight" ? "weak" : "edge";
      for (const reader of drawn) groups[kind].push(edge(key, place, reader, first, last));
      if (at.line >= first && at.line < last && lines[at.line].row !== undefined) {
        dots[node.state].push(dot(at.x, middle(at.line), node.kind));
      }
    });
  }
  data.b.nodes.forEach((node, b) => {
    for (const name of node.partners || []) {
      const a = data.a.place.get(name);
      const isDrawn = isKept(node) ? data.a.row[a] !== data.b.row[b] : node.kind !== "weight";
      if (isDrawn) groups.join.push(join(a, b, first, last));
    }
  });
  if (view.selected) chooseEdges(groups, first, last);
  byId("lines").replaceChildren(
    ...Object.entries(groups).map(([name, parts]) => path(name, parts)),
    ...Object.entries(dots).map(([state, parts]) => path(`dot dot-${state}`, parts)));
}

function dot(x, y, kind) {
  if (kind === "weight" || kind === "sub-graph") return `M${x - 2.5} ${y - 2.5}h5v5h-5z`;
  return `M${x - DOT} ${y}a${DOT} ${DOT} 0 1 0 ${2 * DOT} 0a${DOT} ${DOT} 0 1 0 ${-2 * DOT} 0`;
}

function chooseEdges(groups, first, last) {
  const { key, place } = view.selected;
  const node = data[key].nodes[place];
  for (const source of node.sources) groups.chosen.push(edge(key, source, place, first, last));
  for (const reader of data[key].readers[place]) groups.chosen.push(edge(key, place, reader, first, last));
  for (const name of node.partners || []) {
    const partner = data[other[key]].place.get(name);
    const pair = key === "a" ? [place, partner] : [partner, place];
    groups.joined.push(join(...pair, first, last));
  }
}

// A strip as high as the view: where in the whole something differs, is wrong or takes time.
function drawOverview() {
  const canvas = byId("overview");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const size = Math.max(2, height / Math.max(1, lines.length));
  const style = getComputedStyle(document.documentElement);
  lines.forEach((line, number) => {
    if (line.row === undefined) return;
    SIDES.forEach((key, column) => {
      const node = nodeAt(line.row, key);
      const colour = node && style.getPropertyValue(overviewColour(node));
      if (!colour) return;
      pen.fillStyle = colour;
      pen.fillRect(2 + column * (width / 2 - 1), (number * height) / lines.length, width / 2 - 3, size);
    });
  });
}

function overviewColour(node) {
  if (view.colour === "change") return node.state === "same" ? "--none" : `--${node.state}`;
  const value = node[FIELDS[view.colour]];
  return value === undefined ? "--none" : `--heat-${step(view.colour, value)}`;
}
