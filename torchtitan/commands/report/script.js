// Draws the charts of a report anew: for the width of the screen, a logarithmic scale, smoothing,
// and the runs that are shown; and says values under the pointer. Without it the page has the same
// charts as static SVG (charts.py, whose geometry this follows).
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll(".chart")];
  const shown = data.runs.map(() => true);
  const logarithmic = data.charts.map(() => false);
  const places = []; // of each chart as drawn last: step -> x, value -> y
  const [LEFT, RIGHT, TOP, BOTTOM, HEIGHT, CHARACTER] = [52, 16, 10, 26, 220, 7.6];
  const FEW = 30;
  const MOST_TOLD = 6; // runs under the pointer
  let smoothing = 0;

  // How many digits of a value tell it from another that is `step` away.
  function digits(value, step, least) {
    if (!value || !step) return least;
    const place = (size) => Math.floor(Math.log10(size) + 1e-9);
    return Math.min(Math.max(least, place(Math.abs(value)) - place(step) + 1), 15);
  }

  function number(value, step = 0) {
    const size = Math.abs(value);
    if (size && !(size >= 1e-3 && size < 1e16))
      return value.toExponential(digits(value, step, 3) - 1).replace(/\.?0*e\+?/, "e");
    const precision = digits(value, step, 4);
    for (const [unit, of] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
      if (size >= of * (unit === "K" ? 10 : 1)) return +(value / of).toPrecision(precision) + unit;
    return String(+value.toPrecision(precision));
  }

  // The least distance of two neighbours; 0 if there are no two.
  const tickStep = (places) =>
    places.length > 1 ? Math.min(...places.slice(1).map((place, i) => place - places[i])) : 0;

  // Ticks with their labels.
  const labelled = (places) => places.map((tick) => [tick, number(tick, tickStep(places))]);

  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++)
      found.push(+(i * step).toPrecision(12));
    return found;
  }

  // Powers of ten, with 2 and 5 between them where there is room; round numbers in a short range.
  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    if (decades < 1) return ticks(low, high, 5);
    const every = Math.ceil(decades / 6);
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const m of decades < 2.5 ? [1, 2, 5] : [1])
        if (p % every === 0 && m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
    return found;
  }

  function limits(values) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return [0, 1];
    if (high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high))) return [low, high];
    const room = Math.abs(low) / 2 || 0.5;
    return [low - room, high + room];
  }

  // An exponential moving average, corrected for its start, that skips what is missing.
  function smooth(values) {
    if (!smoothing) return values;
    let [sum, weight] = [0, 0];
    return values.map((value) => {
      if (value === null) return null;
      sum = smoothing * sum + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  }

  const classes = (run) =>
    `c${run % 6}` + (run >= 6 ? ` d${1 + ((Math.floor(run / 6) - 1) % 3)}` : "");

  function path(steps, values, x, y) {
    let [text, drawing] = ["", false];
    steps.forEach((step, i) => {
      if (values[i] === null || !Number.isFinite(y(values[i]))) {
        drawing = false;
        return;
      }
      const point = `${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`;
      text += drawing ? " " + point : `M${point}L${point}`;
      drawing = true;
    });
    return text;
  }

  function band(line, x, y) {
    const edge = [];
    line.steps.forEach((step, i) => edge.push([step, line.high[i]]));
    for (let i = line.steps.length - 1; i >= 0; i--) edge.push([line.steps[i], line.low[i]]);
    const points = edge.filter(([, v]) => v !== null && Number.isFinite(y(v)));
    return points.map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  }

  function draw(index) {
    const svg = figures[index].querySelector("svg");
    const width = Math.max(svg.clientWidth, 200);
    const lines = data.charts[index].lines.filter((line) => shown[line.run]);
    const log = logarithmic[index];
    const values = lines
      .flatMap((line) => [...line.mean, ...line.low, ...line.high])
      .filter((v) => v !== null && (!log || v > 0));
    const fromZero = data.charts[index].fromZero && !log;
    let [low, high] = limits(fromZero ? [...values, 0] : values);
    if (log) {
      low = Math.max(low, 1e-30);
      const room = (high / low) ** 0.04;
      [low, high] = [low / room, high * room];
    } else {
      const room = 0.04 * (high - low);
      [low, high] = [fromZero && low === 0 ? 0 : low - room, high + room];
    }
    const [first, last] = limits(lines.flatMap((line) => line.steps));
    const found = labelled(log ? logTicks(low, high) : ticks(low, high, 5));
    const left = Math.max(LEFT, ...found.map(([, text]) => 6 + CHARACTER * text.length));
    const x = (s) => left + ((s - first) / (last - first)) * (width - RIGHT - left);
    const share = log
      ? (v) => (v > 0 ? Math.log(v / low) / Math.log(high / low) : NaN)
      : (v) => (v - low) / (high - low);
    const y = (v) => HEIGHT - BOTTOM + share(v) * (TOP - HEIGHT + BOTTOM);
    const parts = [];
    for (const [tick, text] of found)
      parts.push(
        `<path class="grid" d="M${left},${y(tick).toFixed(1)}H${width - RIGHT}"/>` +
          `<text x="${left - 6}" y="${y(tick) + 4}" text-anchor="end">${text}</text>`
      );
    const steps = ticks(first, last, Math.min(5, width / 70)).filter(Number.isInteger);
    for (const [tick, text] of labelled(steps)) {
      const middle = Math.min(x(tick), width - (CHARACTER / 2) * text.length); // whole at the edge
      parts.push(`<text x="${middle}" y="${HEIGHT - 8}" text-anchor="middle">${text}</text>`);
    }
    for (const line of lines)
      if (line.low.length)
        parts.push(`<polygon class="band c${line.run % 6}" points="${band(line, x, y)}"/>`);
    for (const line of lines) {
      const name = `line ${classes(line.run)}`;
      if (smoothing)
        parts.push(`<path class="${name} raw" d="${path(line.steps, line.mean, x, y)}"/>`);
      parts.push(`<path class="${name}" d="${path(line.steps, smooth(line.mean), x, y)}"/>`);
      if (line.steps.length <= FEW) {
        const dots = line.steps.map((s, i) => path([s], [line.mean[i]], x, y));
        parts.push(`<path class="dots c${line.run % 6}" d="${dots.join("")}"/>`);
      }
      for (const s of line.marks)
        parts.push(`<path class="mark" d="M${x(s) - 4},${HEIGHT - BOTTOM}l8,0l-4,-7z"/>`);
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.innerHTML = parts.join("") + '<g class="pointer"></g>';
    const step = (at) => first + ((at - left) / (width - RIGHT - left)) * (last - first);
    places[index] = { x, y, step, apart: tickStep(found.map(([tick]) => tick)) / 10 };
  }

  const drawAll = () => figures.forEach((_, index) => draw(index));

  // The point of a line that is nearest to a step, by bisection.
  function nearest(steps, step) {
    let [low, high] = [0, steps.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle;
      else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  }

  function point(index, event) {
    const box = figures[index].querySelector("svg").getBoundingClientRect();
    const step = places[index].step(event.clientX - box.left);
    figures.forEach((figure, i) => {
      const { x, y } = places[i];
      const found = data.charts[i].lines
        .filter((line) => shown[line.run])
        .map((line) => [line, nearest(line.steps, step)]);
      const snapped = found.length ? found[0][0].steps[found[0][1]] : null;
      figure.querySelector(".pointer").innerHTML =
        snapped === null
          ? ""
          : `<path class="cursor" d="M${x(snapped)},${TOP}V${HEIGHT - BOTTOM}"/>` +
            found
              .map(([line, j]) => [line, line.steps[j], smooth(line.mean)[j]])
              .filter(([, , v]) => v !== null && Number.isFinite(y(v)))
              .map(
                ([line, s, v]) =>
                  `<circle class="dot c${line.run % 6}" cx="${x(s)}" cy="${y(v)}" r="4"/>`
              )
              .join("");
      const height = ([line, j]) => y(smooth(line.mean)[j] ?? NaN);
      if (i === index)
        tell(figure, near(found, height, event.clientY - box.top), x(snapped ?? 0), places[i].apart);
    });
  }

  // Those that are told: all, or of many the nearest ones, and the nearest first.
  function near(found, height, pointer) {
    if (found.length <= MOST_TOLD) return found;
    return found
      .map((point) => [point, Math.abs(height(point) - pointer)])
      .filter(([, distance]) => Number.isFinite(distance))
      .sort(([, a], [, b]) => a - b)
      .slice(0, MOST_TOLD)
      .map(([point]) => point);
  }

  function tell(figure, found, at, apart) {
    const tip = figure.querySelector(".tip");
    tip.replaceChildren();
    for (const [line, j] of found) {
      const row = document.createElement("div");
      const name = document.createElement("b");
      name.className = `c${line.run % 6}`;
      name.textContent = data.runs.length > 1 ? data.runs[line.run] + " " : "";
      const value = line.mean[j] === null ? "not finite" : number(line.mean[j], apart);
      const range =
        line.low.length && line.low[j] !== null
          ? ` (${number(line.low[j], apart)} to ${number(line.high[j], apart)})`
          : "";
      row.append(name, `step ${line.steps[j]}: ${value}${range}`);
      tip.append(row);
    }
    tip.hidden = !found.length;
    const room = figure.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(at + 12, room))}px`;
    tip.style.top = "2.6em";
  }

  function leave() {
    for (const figure of figures) {
      figure.querySelector(".pointer").innerHTML = "";
      figure.querySelector(".tip").hidden = true;
    }
  }

  figures.forEach((figure, index) => {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    if (data.charts[index].lines.some((line) => line.mean.some((v) => v > 0))) {
      const button = document.createElement("button");
      button.className = "scale";
      button.textContent = "log";
      button.title = "Logarithmic scale";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        logarithmic[index] = !logarithmic[index];
        button.setAttribute("aria-pressed", String(logarithmic[index]));
        draw(index);
      });
      figure.querySelector("figcaption").append(button);
    }
    const svg = figure.querySelector("svg");
    for (const event of ["pointermove", "pointerdown"])
      svg.addEventListener(event, (e) => point(index, e));
    svg.addEventListener("pointerleave", leave);
  });

  document.querySelectorAll(".bar .run").forEach((label, run) => {
    if (data.runs.length < 2) return;
    const button = document.createElement("button");
    button.className = label.className;
    button.innerHTML = label.innerHTML;
    button.title = "Show or hide this run";
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      shown[run] = !shown[run];
      button.setAttribute("aria-pressed", String(shown[run]));
      drawAll();
    });
    label.replaceWith(button);
  });

  const tools = document.querySelector(".tools");
  tools.hidden = false;
  tools.querySelector("input").addEventListener("input", (event) => {
    // Half of the slider is a window of about 10 points, its end one of about 100.
    smoothing = event.target.value > 0 ? 1 - 10 ** (-event.target.value / 50) : 0;
    drawAll();
  });

  new ResizeObserver(drawAll).observe(document.body);
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", drawAll);
  drawAll();
})();
