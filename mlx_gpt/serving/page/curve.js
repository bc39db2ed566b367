// The plot of a run's losses over its steps.

export function curve({ train, val }) {
  const [width, height, left, bottom] = [280, 150, 34, 20];
  const points = [...train, ...val];
  const steps = points.map(point => point[0]), losses = points.map(point => point[1]);
  const low = Math.min(...losses), high = Math.max(...losses), last = Math.max(...steps), first = Math.min(...steps);
  const x = step => left + (width - left - 6) * (step - first) / (last - first || 1);
  const y = loss => 6 + (height - bottom - 10) * (high - loss) / (high - low || 1);
  const node = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const best = val.length ? `; the validation loss fell to ${Math.min(...val.map(point => point[1])).toFixed(2)}` : "";
  svg.setAttribute("aria-label", `Loss over ${last} steps, from ${high.toFixed(2)} to ${low.toFixed(2)}${best}`);
  svg.append(node("path", { class: "axis", d: `M${left} 4V${height - bottom}H${width - 4}` }));
  for (const loss of [low, high]) svg.append(node("text", { x: left - 5, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(1)));
  svg.append(node("text", { x: width - 6, y: height - 5, "text-anchor": "end" }, `${last.toLocaleString("en")} steps`));
  for (const [name, line] of [["train", train], ["val", val]])
    if (line.length) svg.append(node("polyline", { class: name, points: line.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ") }));
  svg.append(node("text", { x: width - 6, y: 14, "text-anchor": "end" }, val.length ? "blue: validation, grey: training" : "training"));
  return svg;
}
