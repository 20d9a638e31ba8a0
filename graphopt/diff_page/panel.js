// What is known of one node, and why it is as it is.

function select(key, place) {
  view.selected = { key, place };
  goTo(data[key].row[place]);
  showPanel(key, data[key].nodes[place]);
  document.body.classList.add("with-panel");
  draw();
}

function deselect() {
  view.selected = null;
  document.body.classList.remove("with-panel");
  byId("panel").replaceChildren();
  draw();
}

// A link to a node by its name, or the bare name where that side has no such node.
function link(key, name) {
  const place = data[key].place.get(name);
  if (place === undefined) return element("code", {}, name);
  return element("button", { class: `link state-${data[key].nodes[place].state}`, onclick: () => select(key, place) }, name);
}

function links(key, names) {
  return names.flatMap((name, i) => (i ? [", ", link(key, name)] : [link(key, name)]));
}

function fact(name, ...value) {
  return value.some((item) => item !== undefined && item !== "" && item?.length !== 0)
    ? [element("dt", {}, name), element("dd", {}, ...value)]
    : [];
}

function part(title, ...content) {
  return content.flat().length ? element("section", {}, element("h3", {}, title), ...content) : undefined;
}

function showPanel(key, node) {
  byId("panel").replaceChildren(...[
    element("button", { class: "close", title: "close (Esc)", "aria-label": "close", onclick: deselect }, "×"),
    element("h2", {}, node.name),
    element("p", {}, element("span", { class: `badge state-${node.state}` }, `${STATES[node.state]} ${node.state}`),
      ` in ${key.toUpperCase()}, ${data[key].title}`),
    element("p", { id: "fate" }, ...fate(key, node)),
    part("Why", ...why(key, node)),
    part("Node", element("dl", {}, ...facts(key, node))),
    part("Arguments", ...argumentTable(key, node)),
    part("Kernels", ...(node.kernels || []).map(kernelLine)),
    part("Left alone", ...notes(node)),
  ].filter(Boolean));
}

// What became of the node, or where it comes from, in a sentence.
function fate(key, node) {
  const far = other[key];
  const partners = node.partners || [];
  if (node.state === "same" && partners[0] !== node.name) return ["The same on both sides, over there ", link(far, partners[0]), "."];
  if (node.state === "same") return ["The same on both sides."];
  if (node.differences) return [`On both sides, but in B: ${node.differences.join("; ")}.`];
  if (node.state === "removed") {
    if (node.stand_in) return ["Gone; what read it reads ", link("b", node.stand_in), " now."];
    return [node.kind === "weight" ? "Gone; nothing reads it any more." : "Gone; B does not compute it."];
  }
  if (node.state === "new") {
    return node.origins ? ["New, made from ", ...links("a", node.origins), "."] : ["Only B has it."];
  }
  return key === "a" ? ["Replaced by ", ...links(far, partners), "."] : ["Stands in the place of ", ...links(far, partners), "."];
}

function why(key, node) {
  const made = (node.changes || []).map((number) => {
    const change = data.changes[number];
    return element("div", { class: "change" },
      element("p", {}, element("b", { class: "rule" }, change.rule),
        change.pass_name === change.rule.split("/")[0] ? "" : ` in ${change.pass_name}`),
      element("p", {}, element("code", {}, change.id)),
      element("p", { class: "measured" }, change.error === null
        ? "error of this rewrite alone: not measured" : `error of this rewrite alone: ${relative(change.error)} relative to float64`),
      element("p", { class: "dim" }, `${change.before.join(", ")} → ${change.after.join(", ") || "nothing"}`));
  });
  const unread = (node.notes || []).filter((note) => note.kind === "removed" && node.state === "removed");
  made.push(...unread.map((note) => element("div", { class: "change" },
    element("p", {}, element("b", { class: "rule" }, note.rule)), element("p", {}, note.reason))));
  const there = isKept(node) ? [] : (node.partners || []).map((name) => data[other[key]].nodes[data[other[key]].place.get(name)]);
  const rules = [...new Set([node, ...there].map((item) => item.rule).filter(Boolean))];
  if (made.length || !rules.length) return made;
  return [element("div", { class: "change" }, element("p", {}, element("b", { class: "rule" }, rules.join(", "))),
    element("p", { class: "dim" }, "as its provenance has it; a report tells more (--report)"))];
}

function facts(key, node) {
  return [
    ...fact("operator", node.operator || node.kind),
    ...fact("type", node.type),
    ...fact("module", node.module),
    ...fact("source", node.source),
    ...fact("sub-graph", node.graph),
    ...fact("made from", ...links("a", node.origins || [])),
    ...fact("read by", ...links(key, data[key].readers[data[key].place.get(node.name)].map((i) => data[key].nodes[i].name))),
    ...fact("error", node.error === undefined ? "" : relative(node.error)),
    ...fact("time", node.seconds === undefined ? "" : seconds(node.seconds)),
  ];
}

// Names of nodes among the arguments are links.
function argumentTable(key, node) {
  const prefix = node.graph ? `${node.graph}.` : "";
  const inputs = new Set(node.inputs || []);
  const rows = (node.arguments || []).map(([name, text]) => {
    const words = text.split(/([\w.]+)/).map((word) => (inputs.has(prefix + word) ? linkAs(key, prefix + word, word) : word));
    return element("tr", {}, element("th", {}, name), element("td", {}, ...words));
  });
  return rows.length ? [element("table", { class: "arguments" }, ...rows)] : [];
}

function linkAs(key, name, text) {
  const made = link(key, name);
  made.textContent = text;
  return made;
}

function kernelLine(number) {
  const kernel = data.kernels[number];
  return element("div", { class: "change" },
    element("p", {}, element("b", {}, kernel.name), ` ${seconds(kernel.seconds)}, ${(100 * kernel.share).toFixed(1)} % of the run`),
    element("p", { class: "dim" }, "computes ", ...links("b", kernel.nodes)));
}

function notes(node) {
  return (node.notes || []).filter((note) => note.kind !== "removed").map((note) => element("div", { class: `note ${note.kind.replace(" ", "-")}` },
    element("p", {}, element("b", {}, note.rule), element("span", { class: "kind" }, note.kind)),
    element("p", {}, note.reason)));
}
