"use strict";

const COLOURS = ["#1f5fa8", "#c7661b", "#1a7f37", "#8250df", "#b42318", "#0e7490", "#a16207", "#be185d"];
const EVERY_MILLISECONDS = 1000;
const MOST = { accuracy: 1, loss: Infinity };
const BOX = { left: 48, right: 590, top: 10, bottom: 310 };
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function niceStep(span, count) {
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

function ticks(low, high, step) {
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

function numbers(runs, measure) {
  return runs.flatMap((run) => [...run[`train_${measure}`], ...run[`valid_${measure}`]]).filter(Number.isFinite);
}

function draw(svg, runs, measure) {
  svg.replaceChildren();
  const values = numbers(runs, measure);
  if (!values.length) {
    svg.append(element("text", { x: 300, y: 170, "text-anchor": "middle" }, "no epochs yet"));
    return;
  }
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 0.1;
  [low, high] = [Math.max(low - margin, 0), Math.min(high + margin, MOST[measure])];
  const last = Math.max(1, ...runs.flatMap((run) => run.epochs));
  const x = (epoch) => BOX.left + ((BOX.right - BOX.left) * epoch) / last;
  const y = (value) => BOX.bottom - ((BOX.bottom - BOX.top) * (value - low)) / (high - low);
  const step = niceStep(high - low, 5);
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  for (const value of ticks(low, high, step)) {
    svg.append(element("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: y(value), y2: y(value) }));
    svg.append(element("text", { x: BOX.left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
  }
  svg.append(element("line", { class: "axis", x1: BOX.left, x2: BOX.right, y1: BOX.bottom, y2: BOX.bottom }));
  for (const epoch of ticks(0, last, Math.max(1, niceStep(last, 8)))) {
    svg.append(element("text", { x: x(epoch), y: BOX.bottom + 18, "text-anchor": "middle" }, epoch));
  }
  svg.append(element("text", { x: 319, y: BOX.bottom + 42, "text-anchor": "middle" }, "epoch"));
  runs.forEach((run, index) => {
    const stroke = COLOURS[index % COLOURS.length];
    for (const phase of ["train", "valid"]) {
      const series = run[`${phase}_${measure}`];
      const points = run.epochs.map((epoch, place) => [epoch, series[place]]).filter(([, value]) => Number.isFinite(value));
      const path = points.map(([epoch, value]) => `${x(epoch).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      svg.append(element("polyline", { class: `line ${phase}`, stroke, points: path }));
    }
    const best = run[`valid_${measure}`][run.epochs.indexOf(run.best_epoch)];
    if (Number.isFinite(best)) {
      svg.append(element("circle", { class: "best", stroke, cx: x(run.best_epoch), cy: y(best), r: 4.5 }));
    }
  });
}

function cell(text) {
  const made = document.createElement("td");
  made.textContent = text;
  return made;
}

function row(run, index) {
  const last = run.epochs.length - 1;
  const shown = (series, digits) => (Number.isFinite(series[last]) ? series[last].toFixed(digits) : "–");
  const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–");
  const name = cell(run.name);
  const swatch = element("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" });
  swatch.append(element("rect", { width: 10, height: 10, fill: COLOURS[index % COLOURS.length] }));
  name.prepend(swatch);
  const made = document.createElement("tr");
  made.append(
    name,
    cell(last < 0 ? "–" : run.epochs[last]),
    cell(shown(run.train_loss, 3)),
    cell(shown(run.valid_loss, 3)),
    cell(percent(run.train_accuracy[last])),
    cell(percent(run.valid_accuracy[last])),
    cell(percent(run.valid_accuracy[run.epochs.indexOf(run.best_epoch)])),
    cell(run.state),
  );
  return made;
}

async function refresh() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("runs.json");
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const runs = await answer.json();
    draw(document.getElementById("accuracy"), runs, "accuracy");
    draw(document.getElementById("loss"), runs, "loss");
    document.getElementById("runs").replaceChildren(...runs.map(row));
    const training = runs.filter((run) => run.state === "training").length;
    state.textContent = training ? `live: ${training} of ${runs.length} training` : "none is training";
  } catch (error) {
    state.textContent = `cannot read the runs (${error.message}); trying again`;
  }
  setTimeout(refresh, EVERY_MILLISECONDS);
}

refresh();
