"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const families = [...new Set(report.trials.map((trial) => trial.family))];
  const hidden = new Set();
  const color = (family) => `var(--c${families.indexOf(family) % 8})`;
  const shown = () => report.trials.filter((trial) => !hidden.has(trial.family));
  const lower = report.goal === "minimize";

  // Elements: all text goes in as text.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const draw = (tag, attributes = {}, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Numbers as people read them.
  const digits = (value, count = 4) => (value == null ? "–" : String(Number(value.toPrecision(count))));
  const fixed = (value, count = 5) => (value == null ? "–" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toPrecision(count) : value.toExponential(count - 1));
  const scaled = (value, units, step) => {
    if (value == null) return "–";
    let place = 0;
    while (Math.abs(value) >= step && place < units.length - 1) { value /= step; place += 1; }
    return `${Number(value.toPrecision(3))}${units[place]}`;
  };
  const count = (value) => value != null && Math.abs(value) >= 1e18 ? value.toExponential(2) : scaled(value, ["", "K", "M", "B", "T", "P"], 1000);
  const bytes = (value) => scaled(value, [" B", " KiB", " MiB", " GiB", " TiB"], 1024);
  const time = (seconds) => {
    if (seconds == null) return "–";
    if (seconds < 100) return `${Math.round(seconds)} s`;
    if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
    return `${(seconds / 3600).toFixed(1)} h`;
  };
  const plain = (value) => (value == null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));

  const tip = at("tip");
  const explain = (element, text) => {
    element.addEventListener("pointermove", (event) => {
      tip.textContent = typeof text === "function" ? text() : text;
      tip.hidden = false;
      const width = tip.offsetWidth;
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    });
    element.addEventListener("pointerleave", () => { tip.hidden = true; });
  };

  // Axes.
  const linear = (low, high, from, to) => {
    if (high === low) { high += 0.5 * Math.abs(high) || 1; low -= 0.5 * Math.abs(low) || 1; }
    const scale = (value) => from + ((value - low) / (high - low)) * (to - from);
    scale.ticks = (wanted) => {
      const rough = (high - low) / wanted;
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
      const ticks = [];
      for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9 * step; tick += step) ticks.push(Math.abs(tick) < 1e-9 * step ? 0 : tick);
      return ticks;
    };
    return scale;
  };
  const logarithmic = (low, high, from, to) => {
    const inner = linear(Math.log10(low), Math.log10(high), from, to);
    const scale = (value) => inner(Math.log10(value));
    scale.ticks = (wanted) => {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
        for (const factor of [1, 2, 3, 5]) found.push(factor * 10 ** power);
      const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
      const every = Math.ceil(inside.length / (wanted + 1));
      return inside.length >= 2 ? inside.filter((_, index) => index % every === 0) : linear(low, high, 0, 1).ticks(wanted);
    };
    return scale;
  };
  const frame = (box, width, height, label) => {
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    box.replaceChildren(svg);
    return svg;
  };
  const axes = (svg, x, y, area, xLabel, yLabel, xText) => {
    for (const tick of y.ticks(5)) {
      svg.append(draw("line", { class: "grid", x1: area.left, x2: area.right, y1: y(tick), y2: y(tick) }));
      svg.append(draw("text", { x: area.left - 8, y: y(tick) + 4, "text-anchor": "end" }, digits(tick, 3)));
    }
    for (const tick of x.ticks(Math.max(3, Math.floor((area.right - area.left) / 110)))) {
      svg.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: area.top, y2: area.bottom }));
      svg.append(draw("text", { x: x(tick), y: area.bottom + 18, "text-anchor": "middle" }, xText(tick)));
    }
    svg.append(draw("line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom }));
    svg.append(draw("text", { x: area.right, y: area.bottom + 36, "text-anchor": "end" }, xLabel));
    svg.append(draw("text", { x: area.left, y: area.top - 8 }, yLabel));
  };
  const wide = (box) => Math.max(300, Math.min(1200, box.clientWidth || 900));

  function header() {
    const total = report.trials.length;
    const done = report.trials.filter((trial) => trial.status === "finished");
    const failed = report.trials.filter((trial) => trial.status === "failed").length;
    at("title").textContent = report.name;
    at("subtitle").textContent = `${total} trials, ${done.length} finished${failed ? `, ${failed} failed` : ""}; ` +
      `compared by ${report.metric}, ${lower ? "lower" : "higher"} is better`;
    const tiles = [];
    if (report.groups.length) tiles.push([digits(report.groups[0].mean), `best: ${report.groups[0].group}`]);
    const sum = (key) => done.reduce((before, trial) => before + (trial[key] || 0), 0);
    tiles.push([`${done.length} of ${total}`, "trials finished"]);
    tiles.push([count(sum("tokens")), "tokens trained on"]);
    tiles.push([count(sum("flops")), "model FLOPs"]);
    if (sum("seconds")) tiles.push([time(sum("seconds")), "of all trials together"]);
    at("tiles").replaceChildren(...tiles.map(([value, label]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, label))));
  }

  function legend() {
    const buttons = families.map((family) => {
      const patch = make("i", {});
      patch.style.background = color(family);
      const button = make("button", { type: "button", "aria-pressed": "true" }, patch, make("span", {}, family));
      button.addEventListener("click", () => {
        if (hidden.has(family)) hidden.delete(family); else hidden.add(family);
        button.setAttribute("aria-pressed", String(!hidden.has(family)));
        redraw();
      });
      return button;
    });
    at("legend").replaceChildren(...buttons);
  }

  const xKinds = {
    steps: () => 1,
    tokens: (trial) => trial.curve.tokens_per_step,
    FLOPs: (trial) => 3 * (trial.flops_per_token || 0) * trial.curve.tokens_per_step,
  };
  const yKinds = { "training, nats a token": "loss", "held out, nats a token": "heldout_loss" };

  function curves() {
    const box = at("curves");
    const factor = xKinds[at("curve-x").value];
    const kind = yKinds[at("curve-y").value];
    const lines = shown().map((trial) => ({ trial, points: trial.curve[kind].map(([step, loss]) => [step * factor(trial), loss]) }))
      .filter((line) => line.points.length && line.points.every(([value]) => value > 0));
    if (!lines.length) { box.replaceChildren(make("p", { class: "note" }, "No losses yet.")); return; }
    const width = wide(box), height = Math.max(260, Math.min(420, width * 0.5));
    const area = { left: 52, right: width - 14, top: 26, bottom: height - 44 };
    const all = lines.flatMap((line) => line.points);
    const log = at("curve-log").checked;
    const low = (index) => Math.min(...all.map((point) => point[index])), high = (index) => Math.max(...all.map((point) => point[index]));
    const positive = log && low(1) > 0;
    const x = (log ? logarithmic : linear)(log ? low(0) : 0, high(0), area.left, area.right);
    const y = (positive ? logarithmic : linear)(low(1), high(1), area.bottom, area.top);
    const svg = frame(box, width, height, "loss curves");
    axes(svg, x, y, area, at("curve-x").value, "nats a token", (tick) => count(tick));
    const hits = [];
    for (const { trial, points } of lines) {
      const path = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
      const line = draw("polyline", { class: "curve", points: path, style: `stroke:${color(trial.family)}` });
      const hit = draw("polyline", { class: "hit", points: path });
      hit.addEventListener("pointerenter", () => { line.classList.add("near"); });
      hit.addEventListener("pointerleave", () => line.classList.remove("near"));
      explain(hit, `${trial.name}\nlast: ${digits(points.at(-1)[1])}`);
      svg.append(line);
      if (points.length === 1) svg.append(draw("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, style: `fill:${color(trial.family)}` }));
      hits.push(hit);
    }
    svg.append(...hits);
  }

  function spread() {
    const rows = report.groups.filter((row) => !hidden.has(row.family)).slice(0, 60);
    at("groups-section").hidden = !report.groups.length;
    if (!rows.length) { at("groups").replaceChildren(); return; }
    const box = at("groups"), width = wide(box), narrow = width < 620, rowHeight = narrow ? 38 : 25;
    const longest = Math.max(...rows.map((row) => row.group.length));
    const left = narrow ? 8 : Math.min(0.45 * width, 24 + 6.9 * longest);
    const area = { left, right: width - 70, top: 10, bottom: 16 + rows.length * rowHeight };
    const low = Math.min(...rows.map((row) => Math.min(row.low, row.mean - (row.deviation || 0))));
    const high = Math.max(...rows.map((row) => Math.max(row.high, row.mean + (row.deviation || 0))));
    const pad = 0.03 * (high - low) || 0.05 * Math.abs(high) || 1;
    const x = linear(low - pad, high + pad, area.left, area.right);
    const svg = frame(box, width, area.bottom + 44, "final metric of each group");
    for (const tick of x.ticks(Math.max(3, Math.floor((area.right - area.left) / 110)))) {
      svg.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: area.top, y2: area.bottom }));
      svg.append(draw("text", { x: x(tick), y: area.bottom + 18, "text-anchor": "middle" }, digits(tick, 4)));
    }
    svg.append(draw("text", { x: area.right, y: area.bottom + 36, "text-anchor": "end" }, report.metric));
    const most = Math.floor((narrow ? width - 80 : left - 24) / 6.9);
    rows.forEach((row, index) => {
      const y = area.top + 14 + index * rowHeight + (narrow ? 14 : 0);
      const name = row.group.length > most ? `${row.group.slice(0, Math.max(1, most - 1))}…` : row.group;
      svg.append(draw("text", { class: "name", x: narrow ? area.left : area.left - 12, y: narrow ? y - 13 : y + 4, "text-anchor": narrow ? "start" : "end" }, name));
      const style = `stroke:${color(row.family)};fill:${color(row.family)}`;
      if (row.deviation != null) {
        svg.append(draw("line", { x1: x(row.mean - row.deviation), x2: x(row.mean + row.deviation), y1: y, y2: y, style, "stroke-width": 6, "stroke-linecap": "round", opacity: 0.28 }));
      }
      for (const value of row.values) svg.append(draw("circle", { cx: x(value), cy: y, r: 3.2, style, opacity: 0.6 }));
      svg.append(draw("line", { x1: x(row.mean), x2: x(row.mean), y1: y - 8, y2: y + 8, style, "stroke-width": 2.5 }));
      svg.append(draw("text", { x: area.right + 8, y: y + 4 }, fixed(row.mean, 4)));
      const hit = draw("rect", { x: 0, y: y - rowHeight / 2, width, height: rowHeight, fill: "transparent" });
      explain(hit, `${row.group}\nmean ${digits(row.mean, 5)} of ${row.count}` + (row.deviation == null ? "" : `\nstandard deviation ${digits(row.deviation, 3)}\nfrom ${digits(row.low, 5)} to ${digits(row.high, 5)}`));
      svg.append(hit);
    });
  }

  function ladders() {
    at("ladder-section").hidden = !report.ladder.length;
    const charts = [];
    const laws = make("tbody");
    for (const entry of report.ladder) {
      if (hidden.has(entry.family)) continue;
      const box = make("div");
      const chart = make("div", { class: "chart" });
      box.append(make("h3", {}, entry.family), chart);
      charts.push([entry, chart]);
      const law = (fit, unit) => (fit ? `${digits(fit.scale, 3)} · FLOPs^${digits(fit.exponent, 3)}${unit}` : "needs two minima");
      laws.append(make("tr", {}, make("td", { class: "text" }, entry.family), make("td", {}, law(entry.parameters, "")), make("td", {}, law(entry.loss, ""))));
      box.dataset.family = entry.family;
    }
    at("ladder").replaceChildren(...charts.map(([, chart]) => chart.parentElement));
    for (const [entry, chart] of charts) ladder(entry, chart);
    const head = make("thead", {}, make("tr", {}, make("th", { class: "text" }, "family"), make("th", {}, "best parameters"), make("th", {}, `best ${report.metric}`)));
    at("laws").replaceChildren(head, laws);
  }

  function ladder(entry, box) {
    const points = entry.rungs.flatMap((rung) => rung.points);
    if (!points.length) { box.replaceChildren(make("p", { class: "note" }, "No results yet.")); return; }
    const width = Math.max(290, Math.min(600, box.clientWidth || 420)), height = 270;
    const area = { left: 52, right: width - 14, top: 26, bottom: height - 44 };
    const sizes = points.map((point) => point[0]), losses = points.map((point) => point[1]);
    const minima = entry.rungs.filter((rung) => rung.minimum).map((rung) => rung.loss);
    const x = logarithmic(Math.min(...sizes) * 0.93, Math.max(...sizes) * 1.07, area.left, area.right);
    const low = Math.min(...losses, ...minima), high = Math.max(...losses), pad = 0.06 * (high - low) || 0.1;
    const y = linear(low - pad, high + pad, area.bottom, area.top);
    const svg = frame(box, width, height, `losses of ${entry.family} by parameters and budget`);
    axes(svg, x, y, area, "parameters", report.metric, (tick) => count(tick));
    entry.rungs.forEach((rung, index) => {
      const shade = `color-mix(in srgb, ${color(entry.family)} ${Math.round(35 + (65 * (index + 1)) / entry.rungs.length)}%, var(--card))`;
      if (rung.coefficients && rung.points.length) {
        const [a, b, c] = rung.coefficients, ends = rung.points.map((point) => Math.log(point[0]));
        const from = Math.min(...ends), to = Math.max(...ends), path = [];
        for (let i = 0; i <= 40; i += 1) { const u = from + ((to - from) * i) / 40; path.push(`${x(Math.exp(u)).toFixed(1)},${y(a * u * u + b * u + c).toFixed(1)}`); }
        svg.append(draw("polyline", { class: "curve", points: path.join(" "), style: `stroke:${shade}` }));
      }
      for (const [size, loss] of rung.points) {
        const dot = draw("circle", { cx: x(size), cy: y(loss), r: 3.5, style: `fill:${shade}` });
        explain(dot, `${rung.budget.toExponential(2)} FLOPs\n${count(size)} parameters\n${digits(loss, 5)}`);
        svg.append(dot);
      }
      if (rung.minimum) {
        const best = draw("circle", { cx: x(rung.parameters), cy: y(rung.loss), r: 6, style: `stroke:${shade};fill:${shade};fill-opacity:.35`, "stroke-width": 2 });
        explain(best, `${rung.budget.toExponential(2)} FLOPs\nbest: ${count(rung.parameters)} parameters\n${digits(rung.loss, 5)}`);
        svg.append(best);
      }
    });
  }

  function matches() {
    const solved = report.trials.filter((trial) => Object.keys(trial.chosen).length);
    at("match-section").hidden = !report.match || !report.trials.length;
    if (!report.match) return;
    const by = report.vary ? `, by ${report.vary === "both" ? "width and depth" : report.vary}` : "";
    at("match-title").textContent = `What was solved for: equal ${report.match}${by}`;
    const seen = new Map();
    for (const trial of report.trials) {
      const key = [trial.family, trial.size, trial.budget, JSON.stringify(trial.chosen)].join("|");
      if (!seen.has(key)) seen.set(key, trial);
    }
    const body = make("tbody");
    for (const trial of seen.values()) {
      const chosen = Object.entries(trial.chosen).map(([key, value]) => `${key.replace(/^model\./, "")} = ${plain(value)}`).join(", ");
      body.append(make("tr", {}, make("td", { class: "text" }, trial.family), make("td", {}, count(trial.size)), make("td", {}, trial.parameters.toLocaleString("en")),
        make("td", {}, trial.flops_per_token == null ? "–" : Math.round(trial.flops_per_token).toLocaleString("en")), make("td", {}, trial.tokens.toLocaleString("en")), make("td", { class: "text wrap" }, chosen || "as it was")));
    }
    const names = ["family", "asked for", "parameters", "FLOPs a token", "tokens", "chosen"];
    const head = names.map((name) => make("th", { class: name === "family" || name === "chosen" ? "text" : "" }, name));
    at("match").replaceChildren(make("thead", {}, make("tr", {}, ...head)), body);
  }

  function columns() {
    const link = (path, text) => make("a", { href: path.split("/").map(encodeURIComponent).join("/") }, text);
    const keys = [...new Set(report.trials.flatMap((trial) => Object.keys(trial.settings)))];
    const short = (key) => {
      const words = key.split(".");
      const last = words.at(-1);
      return keys.some((other) => other !== key && other.endsWith(`.${last}`)) ? words.slice(-2).join(".") : last;
    };
    return [
      { name: "trial", text: true, value: (trial) => trial.name, cell: (trial) => {
        const dot = make("span", { class: "dot" });
        dot.style.background = color(trial.family);
        return [dot, trial.name];
      } },
      { name: "status", text: true, value: (trial) => trial.status, cell: (trial) => [make("span", { class: trial.status === "finished" || trial.status === "failed" ? trial.status : "" }, trial.status)] },
      { name: report.metric, value: (trial) => trial.metric, cell: (trial) => [fixed(trial.metric)] },
      ...keys.map((key) => ({ name: short(key), value: (trial) => trial.settings[key], cell: (trial) => [plain(trial.settings[key])] })),
      { name: "parameters", value: (trial) => trial.parameters, cell: (trial) => [count(trial.parameters)] },
      { name: "FLOPs", value: (trial) => trial.flops, cell: (trial) => [count(trial.flops)] },
      { name: "tokens", value: (trial) => trial.tokens, cell: (trial) => [count(trial.tokens)] },
      { name: "tokens/s", value: (trial) => trial.tokens_per_second, cell: (trial) => [count(trial.tokens_per_second)] },
      { name: "peak memory", value: (trial) => trial.memory, cell: (trial) => {
        const cell = make("span", {}, bytes(trial.memory));
        if (trial.memory_of) explain(cell, trial.memory_of === "device" ? "of the device that used most" : "of the process: the devices do not say");
        return [cell];
      } },
      { name: "time", value: (trial) => trial.seconds, cell: (trial) => [time(trial.seconds)] },
      { name: "starts", value: (trial) => trial.attempts, cell: (trial) => [String(trial.attempts)] },
      { name: "files", text: true, value: null, cell: (trial) => [link(trial.config, "config"), " ", link(trial.workdir, "run"), " ", link(trial.log, "log")] },
    ];
  }

  const order = { column: 2, descending: !lower };
  function table() {
    const all = columns();
    const wanted = at("filter").value.trim().toLowerCase();
    const rows = shown().filter((trial) => trial.name.toLowerCase().includes(wanted));
    const value = all[order.column].value;
    const sign = order.descending ? -1 : 1;
    rows.sort((one, other) => {
      const a = value(one), b = value(other);
      if (a == null || b == null) return (a == null) - (b == null);  // what is not known comes last, either way
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * plain(a).localeCompare(plain(b), "en", { numeric: true });
    });
    const head = make("tr");
    all.forEach((column, index) => {
      const cell = make("th", { scope: "col", class: column.text ? "text" : "" });
      if (column.value) {
        const button = make("button", { type: "button" }, column.name);
        button.addEventListener("click", () => {
          order.descending = order.column === index ? !order.descending : false;
          order.column = index;
          table();
          at("trials").querySelectorAll("th")[index].querySelector("button").focus();
        });
        cell.append(button);
        cell.setAttribute("aria-sort", order.column === index ? (order.descending ? "descending" : "ascending") : "none");
      } else cell.append(column.name);
      head.append(cell);
    });
    const body = make("tbody");
    for (const trial of rows) body.append(make("tr", {}, ...all.map((column) => make("td", { class: column.text ? "text" : "" }, ...column.cell(trial)))));
    at("trials").replaceChildren(make("thead", {}, head), body);
  }

  function redraw() { curves(); spread(); ladders(); table(); }

  for (const kind of Object.keys(xKinds)) at("curve-x").append(make("option", {}, kind));
  for (const kind of Object.keys(yKinds)) at("curve-y").append(make("option", {}, kind));
  for (const id of ["curve-x", "curve-y", "curve-log"]) at(id).addEventListener("change", curves);
  at("filter").addEventListener("input", table);
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); });
  header();
  legend();
  matches();
  redraw();
})();
