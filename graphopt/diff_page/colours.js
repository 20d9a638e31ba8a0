// What a colour says: what changed, the error of the rewrite that made the node, or the time of its kernels.

const STATES = { same: "=", changed: "~", removed: "−", new: "+" };
const STEPS = 6;
const FINEST = 1e-8; // relative; float32 rounds at 6e-8

function scale(key) {
  const values = SIDES.flatMap((side) => data[side].nodes.map((node) => node[key])).filter((value) => value > 0);
  return values.length ? { low: Math.min(...values), high: Math.max(...values) } : undefined;
}
const scales = { error: scale("error"), seconds: scale("seconds") };
const FIELDS = { error: "error", time: "seconds" };
const MEANING = {
  change: "what became of each node; click to show or hide",
  error: "relative error of the rewrite on its own, against float64",
  time: "time of the kernels that hold the node",
};
const SHOW = { error: relative, time: seconds };

// 1 to STEPS: errors by decades from FINEST up, the same on every page; times by the square root of their share of the
// largest. 0 is a plain 0.
function step(colour, value) {
  if (!value) return 0;
  const part = colour === "error" ? Math.log10(value / FINEST) : Math.sqrt(value / scales.seconds.high) * STEPS;
  return 1 + Math.max(0, Math.min(STEPS - 1, Math.floor(part)));
}

function tint(node, colour) {
  if (colour === "change") return `state-${node.state}`;
  const value = node[FIELDS[colour]];
  return value === undefined ? "quiet" : `heat-${step(colour, value)}`;
}

function counted(state) {
  if (state === "removed") return data.a.nodes.filter((node) => node.state === state).length;
  if (state !== "changed") return data.b.nodes.filter((node) => node.state === state).length;
  return SIDES.map((key) => data[key].nodes.filter((node) => node.state === state).length).join(" → ");
}

function drawLegend() {
  const chips = view.colour === "change"
    ? Object.keys(STATES).map((state) => element("button", {
        class: `chip state-${state}`, "data-state": state, "aria-pressed": !view.hidden.has(state),
        title: `show or hide what is ${state}`, onclick: () => toggleState(state),
      }, element("b", {}, STATES[state]), ` ${state} `, element("span", { class: "count" }, String(counted(state)))))
    : [
        element("span", {}, view.colour === "error" ? relative(FINEST) : "0"),
        ...Array.from({ length: STEPS }, (_, i) => element("i", { class: `swatch heat-${i + 1}` })),
        element("span", {}, view.colour === "error" ? relative(FINEST * 10 ** STEPS) : seconds(scales.seconds.high)),
      ];
  byId("legend").title = MEANING[view.colour];
  byId("legend").replaceChildren(...chips);
}

function toggleState(state) {
  if (!view.hidden.delete(state)) view.hidden.add(state);
  drawLegend();
  arrange();
}
