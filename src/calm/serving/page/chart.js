// A chart of tokens over time: one line per model, drawn while the texts appear.

const WIDTH = 600, HEIGHT = 160, LEFT = 44, RIGHT = 130, TOP = 10, BOTTOM = 24;

function node(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export class SpeedChart {
  constructor(figure, names) {
    this.figure = figure;
    this.svg = figure.querySelector("svg");
    this.series = names.map((name) => ({ name, points: [[0, 0]] }));
  }

  // A model has written this many tokens after this many seconds of its own steps.
  add(index, seconds, tokens) {
    this.series[index].points.push([seconds, tokens]);
    this.pending ??= requestAnimationFrame(() => {
      this.pending = undefined;
      this.draw();
    });
  }

  draw() {
    const all = this.series.flatMap((series) => series.points);
    const longest = Math.max(...all.map((point) => point[0])), most = Math.max(...all.map((point) => point[1]));
    if (!longest) return;
    const x = (seconds) => LEFT + (seconds / longest) * (WIDTH - LEFT - RIGHT);
    const y = (tokens) => HEIGHT - BOTTOM - (tokens / most) * (HEIGHT - TOP - BOTTOM);
    const parts = [
      node("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0), class: "axis" }),
      node("line", { x1: LEFT, x2: LEFT, y1: y(0), y2: TOP, class: "axis" }),
      node("text", { x: LEFT - 6, y: y(0), "text-anchor": "end" }, "0"),
      node("text", { x: LEFT - 6, y: TOP + 10, "text-anchor": "end" }, String(most)),
      node("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `${longest.toFixed(2)} s`),
      node("text", { x: LEFT, y: HEIGHT - 6 }, "0"),
    ];
    const labels = this.series.map((series, index) => {
      const [seconds, tokens] = series.points.at(-1);
      const points = series.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ");
      parts.push(node("polyline", { points, class: `series series-${index % 4}` }));
      const speed = seconds ? `${(tokens / seconds).toFixed(0)} tokens/s` : "";
      return { index, height: y(tokens), name: series.name.slice(0, 18), speed };
    });
    labels.sort((a, b) => a.height - b.height);
    let lowest = TOP;
    for (const label of labels) {
      const height = Math.max(label.height, lowest);
      lowest = height + 30;
      const attributes = { x: WIDTH - RIGHT + 8, class: `label label-${label.index % 4}` };
      parts.push(node("text", { ...attributes, y: height + 4 }, label.name));
      parts.push(node("text", { ...attributes, y: height + 18 }, label.speed));
    }
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", labels.map((label) => `${label.name}: ${label.speed}`).join("; "));
    this.figure.hidden = false;
  }
}
