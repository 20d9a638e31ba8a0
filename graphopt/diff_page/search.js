// Search: every word must occur in a node; op:, module:, rule: and state: ask for one of its fields.

const ASKED = { op: "operator", operator: "operator", module: "module", rule: "rule", state: "state", name: "name" };

function matcher(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [, field, rest] = /^(\w+):(.*)$/.exec(word) || [];
    return ASKED[field] ? { field: ASKED[field], word: rest } : { word };
  });
  return (node) => words.every(({ field, word }) => (field ? ofField(node, field) : node.text).includes(word));
}

// The rule that made a node, and those that took it away.
function ofField(node, field) {
  const own = node[field] || "";
  const rules = field === "rule" ? (node.changes || []).map((number) => data.changes[number].rule) : [];
  return [own, ...rules].join("\n").toLowerCase();
}

function search(text) {
  view.matches = [];
  view.at = -1;
  if (text.trim()) {
    const fits = matcher(text);
    data.rows.forEach(([a, b], row) => {
      if (a !== null && fits(data.a.nodes[a])) view.matches.push({ key: "a", place: a, row });
      if (b !== null && fits(data.b.nodes[b])) view.matches.push({ key: "b", place: b, row });
    });
  }
  view.matchSet = new Set(view.matches.map(({ key, place }) => `${key}${place}`));
  sayFound();
  draw();
}

function sayFound() {
  const count = view.matches.length;
  byId("found").textContent = !byId("search").value.trim() ? "" : view.at < 0 ? `${count} found` : `${view.at + 1} of ${count}`;
}

function nextMatch(by) {
  const count = view.matches.length;
  if (!count) return;
  view.at = view.at < 0 ? (by > 0 ? 0 : count - 1) : (view.at + by + count) % count;
  const { key, place } = view.matches[view.at];
  select(key, place);
  sayFound();
}
