"use strict";
// The diff as the page was given it, and what follows from it: places by name, readers of values, rows of nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["a", "b"];
const other = { a: "b", b: "a" };
const byId = (id) => document.getElementById(id);

for (const key of SIDES) {
  const side = data[key];
  side.place = new Map(side.nodes.map((node, i) => [node.name, i]));
  side.row = new Array(side.nodes.length).fill(-1);
  side.readers = side.nodes.map(() => []);
  side.nodes.forEach((node, i) => {
    node.sources = (node.inputs || []).map((name) => side.place.get(name)).filter((place) => place !== undefined);
    for (const source of node.sources) side.readers[source].push(i);
    node.text = [node.name, node.operator, node.module, node.rule, node.source].join("\n").toLowerCase();
  });
  side.width = 22 + 9 * Math.max(0, ...side.nodes.map((node) => node.lane ?? 0));
}
data.rows.forEach(([a, b], row) => {
  if (a !== null) data.a.row[a] = row;
  if (b !== null) data.b.row[b] = row;
});

function nodeAt(row, key) {
  const place = data.rows[row][key === "a" ? 0 : 1];
  return place === null ? undefined : data[key].nodes[place];
}

// Whether a node is in both graphs, under whatever name, and not only replaced by another.
const isKept = (node) => node.state === "same" || Boolean(node.differences);

// Equal nodes that stand at one height; only such rows are folded away.
const equal = data.rows.map((_, row) => {
  const [a, b] = [nodeAt(row, "a"), nodeAt(row, "b")];
  return Boolean(a && b && a.state === "same" && b.state === "same" && a.partners[0] === b.name);
});
const graphOf = new Array(data.rows.length);
for (const section of data.sections) graphOf.fill(section.graph, section.start, section.end);

// An element; text is text, never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== ""));
  return made;
}

function seconds(value) {
  for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return `${(value * 1e9).toPrecision(3)} ns`;
}

function relative(value) {
  return value === 0 ? "0" : value.toExponential(1);
}

function short(operator) {
  return (operator || "").replace(/^aten\.|^graphopt\./, "").replace(/\.(default|Tensor|Scalar|int)$/, "");
}
