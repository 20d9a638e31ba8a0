// What a pass measured of its settings: how good and how fast the model is at each, as two pictures side by side.

const FRAME = { width: 380, height: 210, left: 62, right: 14, top: 24, bottom: 38 };

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// About `count` round numbers from `low` to `high`.
function ticks(low, high, count) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / size); at * size <= high + size / 1e6; at += 1) found.push(at * size);
  return found;
}

// One line for each variant through its points, `points` being {value, variant, height}.
function picture(title, setting, points) {
  const values = points.map((point) => point.value), heights = points.map((point) => point.height);
  const [left, right, low, high] = [Math.min(...values), Math.max(...values), Math.min(...heights), Math.max(...heights)];
  const spare = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
  const [bottom, top] = [low - spare, high + spare];
  const inner = { width: FRAME.width - FRAME.left - FRAME.right, height: FRAME.height - FRAME.top - FRAME.bottom };
  const x = (value) => FRAME.left + (right === left ? 0.5 : (value - left) / (right - left)) * inner.width;
  const y = (height) => FRAME.top + (1 - (height - bottom) / (top - bottom)) * inner.height;
  const text = (label, at, anchor) => svg("text", { x: at[0], y: at[1], "text-anchor": anchor }, label);
  const short = (number) => String(Number(number.toPrecision(5)));
  const parts = [text(title, [FRAME.left, 14], "start"), text(setting, [FRAME.left + inner.width / 2, FRAME.height - 6], "middle")];
  for (const height of ticks(bottom, top, 4)) {
    parts.push(svg("path", { class: "grid", d: `M${FRAME.left},${y(height)}h${inner.width}` }));
    parts.push(text(short(height), [FRAME.left - 6, y(height) + 4], "end"));
  }
  for (const value of [...new Set(values)]) parts.push(text(short(value), [x(value), FRAME.height - 22], "middle"));
  const variants = [...new Set(points.map((point) => point.variant))];
  variants.forEach((variant, number) => {
    const own = points.filter((point) => point.variant === variant).sort((one, two) => one.value - two.value);
    const line = own.map((point) => `${x(point.value)},${y(point.height)}`).join("L");
    parts.push(svg("path", { class: `line variant-${number}`, d: `M${line}` }));
    for (const point of own) {
      const name = svg("title", {}, `${variant}: ${short(point.height)} at ${short(point.value)} ${setting}`);
      parts.push(svg("circle", { class: `variant-${number}`, cx: x(point.value), cy: y(point.height), r: 4 }, name));
    }
    if (variants.length > 1) parts.push(svg("text", { class: `variant-${number}`, x: FRAME.width - FRAME.right, y: 14 + 15 * number, "text-anchor": "end" }, variant));
  });
  return svg("svg", { class: "chart", width: FRAME.width, height: FRAME.height, role: "img", "aria-label": `${title} by ${setting}` }, ...parts);
}

function charts(item) {
  const points = item.trade_offs, timed = points.filter((point) => point.seconds !== null && point.variant === points[0].variant);
  const setting = points[0].setting;
  const pictures = [picture(data.metric, setting, points.map((point) => ({ ...point, height: point.metric })))];
  if (timed.length) pictures.push(picture("milliseconds", setting, timed.map((point) => ({ ...point, height: 1e3 * point.seconds }))));
  return element("div", { class: "charts" }, ...pictures);
}
