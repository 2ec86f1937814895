// The page of watched trainings: a map of all layers, and one layer at a time, unpacked and drawn when selected.
(() => {
  const { data, element, draw, unitTable } = report;
  const place = (id) => document.getElementById(id);
  const { runs, layers } = data;

  // Three bytes per number: float32 without the last byte of its mantissa (pack in page.py).
  const unpack = (text) => {
    const bytes = atob(text), words = new Uint32Array(bytes.length / 3);
    for (let i = 0; i < words.length; i++) {
      words[i] = (bytes.charCodeAt(3 * i) << 8) | (bytes.charCodeAt(3 * i + 1) << 16) | (bytes.charCodeAt(3 * i + 2) << 24);
    }
    return new Float32Array(words.buffer);
  };
  const rowsOf = (packed, rows) => {
    const all = unpack(packed), width = all.length / rows;
    return Array.from({ length: rows }, (_, row) => all.subarray(row * width, (row + 1) * width));
  };
  const unique = (values) => [...new Set(values)];

  // --- the selection is in the address, so that it survives a reload
  const saved = new URLSearchParams(location.hash.slice(1));
  const parseIndex = (text, length) => (/^\d+$/.test(text ?? "") && Number(text) < length ? Number(text) : 0);
  const state = {
    layer: parseIndex(saved.get("layer"), layers.length),
    map: data.maps.some((map) => map.id === saved.get("map")) ? saved.get("map") : data.maps[0]?.id,
    run: parseIndex(saved.get("run"), runs.length),
  };
  const keep = () => history.replaceState(null, "", `#${new URLSearchParams(state)}`);

  // --- charts
  const records = (curve, steps, run, side, log) => {
    const [low, median, high] = curve.rows === 3 ? rowsOf(curve.values, 3) : Array(3).fill(unpack(curve.values));
    const points = [];
    for (let i = 0; i < steps.length; i++) {
      if (!Number.isFinite(median[i]) || (log && median[i] <= 0)) continue;
      const lower = log && !(low[i] > 0) ? median[i] : low[i];
      points.push({ step: steps[i], run, side, low: lower, median: median[i], high: high[i] });
    }
    return points;
  };
  const domain = (panel, values) => {
    let [low, high] = [Math.min(...values.map((v) => v.low)), Math.max(...values.map((v) => v.high))];
    for (const layer of panel.spec.layer) {
      for (const guide of layer.data?.values ?? []) [low, high] = [Math.min(low, guide.at), Math.max(high, guide.at)];
    }
    const room = 0.06 * (high - low) || 0.05;
    const [min, max] = panel.limits;
    return [Math.max(min, low - room), Math.min(max, high + room)];
  };
  const framed = (spec, axis, range) => {
    for (const layer of spec.layer) {
      if (layer.encoding[axis]?.scale) layer.encoding[axis].scale.domain = range;
    }
  };
  const ticked = (spec, values) => {
    const low = Math.ceil(Math.log10(Math.min(...values.map((v) => v.low))));
    const high = Math.floor(Math.log10(Math.max(...values.map((v) => v.high))));
    if (high - low < 1) {  // less than two powers of ten: Vega chooses the ticks, over a factor of at least four
      const [min, max] = [Math.min(...values.map((v) => v.low)), Math.max(...values.map((v) => v.high))];
      const middle = Math.sqrt(min * max), reach = Math.max(2, 1.1 * Math.sqrt(max / min));
      framed(spec, "y", [middle / reach, middle * reach]);
      return;
    }
    const powers = [];
    for (let power = low; power <= high; power += Math.floor((high - low) / 4) + 1) powers.push(10 ** power);
    for (const layer of spec.layer) if (layer.encoding.y?.axis) Object.assign(layer.encoding.y.axis, { values: powers, format: ".0e" });
  };
  const figure = (title, label) => {
    const chart = element("div", { className: "chart", role: "img", ariaLabel: label });
    return [element("figure", {}, element("figcaption", { textContent: title, title }), chart), chart];
  };

  let drawing = 0;
  const drawAll = async (grid, jobs) => {
    const turn = drawing;
    const figures = jobs.map(([title, label]) => figure(title, label));
    grid.replaceChildren(...figures.map(([frame]) => frame));
    for (let i = 0; i < jobs.length && turn === drawing; i++) await draw(figures[i][1], jobs[i][2]());
  };

  const curveJobs = (layer) => data.panels.flatMap((panel) => {
    const points = runs.flatMap((run) => {
      const of = run.layers[layer];
      return panel.series.flatMap(([name, side]) => (of?.curves[name]
        ? records(of.curves[name], of.curves[name].steps ?? run.steps, run.label, side, panel.log) : []));
    });
    if (!points.length) return [];
    return [[panel.title, `${panel.title} against step in ${layers[layer].short}`, () => {
      const spec = structuredClone(panel.spec);
      spec.data = { values: points };
      if (panel.limits) framed(spec, "y", domain(panel, points));
      if (panel.log) ticked(spec, points);
      return spec;
    }]];
  });

  // --- a layer's units at the last step
  const unitsOf = (layer) => {
    const named = Object.keys(data.columns).filter((name) => name !== "run" && name !== "unit");
    const values = Object.fromEntries(Object.keys(data.columns).map((name) => [name, []]));
    runs.forEach((run, r) => {
      const of = run.layers[layer];
      if (!of?.last) return;
      const columns = rowsOf(of.last, named.length);
      for (let unit = 0; unit < of.units; unit++) {
        values.unit.push(unit);
        values.run?.push(r);
        named.forEach((name, i) => {
          const value = columns[i][unit];
          const known = Number.isFinite(value) ? Number(value.toPrecision(4)) : null;
          values[name].push(name === "class" ? known ?? data.classes.length - 1 : known);
        });
      }
    });
    return values;
  };
  const middle = (values, tails) => {
    const sorted = [...values].sort((a, b) => a - b), last = sorted.length - 1;
    return [sorted[Math.floor(tails * last)], sorted[Math.ceil((1 - tails) * last)]];
  };
  const scatterJobs = (values) => data.scatters.map(({ x, y, title, spec }) => [title, `${title}, a point for each unit`, () => {
    const points = values.unit.map((unit, i) => ({ unit, run: runs[values.run?.[i] ?? 0].label, x: values[x][i], y: values[y][i] }))
      .filter((point) => point.x !== null && point.y !== null);
    const chart = structuredClone(spec);
    chart.data = { values: points };
    if (points.length) {
      const frame = (numbers) => {
        const [low, high] = middle(numbers, 0.002), room = 0.05 * (high - low) || 0.1;
        return [low - room, high + room];
      };
      const [from, to] = frame(points.map((p) => p.x));
      framed(chart, "x", [from, to]);
      chart.layer[0].data.values = [{ from, to }];
      framed(chart, "y", frame(points.flatMap((p) => [p.x, p.y])));
    }
    return chart;
  }]);
  const showUnits = (values) => {
    const columns = Object.entries(data.columns).map(([name, header]) => ({ name, header, numeric: name !== "run" && name !== "class" }));
    const names = { run: runs.map((run) => run.label), class: data.classes };
    const { filter } = unitTable(place("unit-table"), place("pager"), { columns, values, names });
    const choices = ["run", "class"].filter((name) => values[name]).map((name) => {
      const codes = unique(values[name]).sort((a, b) => a - b);
      const options = codes.map((value) => element("option", { value: String(value), textContent: names[name][value] }));
      const choice = element("select", {}, element("option", { value: "", textContent: "all" }), ...options);
      choice.addEventListener("change", () => filter(name, choice.value));
      return element("label", {}, name, choice);
    });
    place("unit-choices").replaceChildren(...choices);
  };

  // --- selection
  let map = null;
  const list = element("select", { id: "layers" }, ...layers.map((layer, i) =>
    element("option", { value: String(i), textContent: layer.short })));
  const look = async () => {
    drawing += 1;
    const turn = drawing, layer = state.layer;
    delete document.documentElement.dataset.drawn;
    list.value = String(layer);
    map?.mark(layer);
    place("layer-name").textContent = layers[layer].short;
    place("layer-name").title = layers[layer].name;
    place("layer-facts").textContent = runs.filter((run) => run.layers[layer]).map((run) => {
      const { units, at, about } = run.layers[layer];
      const when = at === null ? "not run in any recorded step" : `last recorded at step ${at.toLocaleString("en")}`;
      const facts = [...about.filter(Boolean).map((text) => text.slice(0, 80)), `${units.toLocaleString("en")} units`, when];
      return `${runs.length > 1 ? `${run.label}: ` : ""}${facts.join(", ")}`;
    }).join("; ");
    const values = unitsOf(layer);
    showUnits(values);
    await drawAll(place("curves"), curveJobs(layer));
    if (turn === drawing) await drawAll(place("scatters"), scatterJobs(values));
    if (turn === drawing) document.documentElement.dataset.drawn = String(layer);
  };
  const choose = (layer, go) => {
    state.layer = layer;
    keep();
    look();
    if (!go) return;
    place("layer").scrollIntoView();
    place("layer-head").focus({ preventScroll: true });
  };

  const showMap = () => {
    const run = runs[state.run], { title, scale, id } = data.maps.find((entry) => entry.id === state.map);
    const values = layers.map((_, layer) => {
      const curve = run.layers[layer]?.curves[id];
      return curve ? rowsOf(curve.values, curve.rows)[curve.rows >> 1] : null;
    });
    map.show({ rows: layers.map((layer) => layer.short), steps: run.steps, values, scale, title, last: run.steps.at(-1) ?? 1 });
  };
  const choices = (label, options, chosen, change) => {
    const select = element("select", {}, ...options.map(([value, textContent]) => element("option", { value, textContent })));
    select.value = chosen;
    select.addEventListener("change", () => change(select.value));
    return element("label", {}, label, select);
  };

  if (layers.length) {
    if (data.maps.length) {
      const frame = document.querySelector(".map");
      map = heatmap(place("heatmap"), frame.querySelector(".tip"), place("map-status"), (layer) => choose(layer, true));
      const change = (key, parse) => (value) => { state[key] = parse(value); keep(); showMap(); };
      place("map-choices").append(choices("quantity", data.maps.map(({ id, title }) => [id, title]), state.map, change("map", String)));
      if (runs.length > 1) {
        place("map-choices").append(choices("run", runs.map((run, i) => [String(i), run.label]), String(state.run), change("run", Number)));
      }
      showMap();
    } else document.querySelector(".map").replaceChildren(element("p", { className: "empty", textContent: "Nothing to draw yet." }));
    const step = (by, text) => {
      const button = element("button", { type: "button", textContent: text });
      button.addEventListener("click", () => choose((state.layer + by + layers.length) % layers.length, false));
      return button;
    };
    list.addEventListener("change", () => choose(Number(list.value), false));
    place("layer-choices").append(element("label", {}, "layer", list), step(-1, "Previous"), step(1, "Next"));
    addEventListener("hashchange", () => {
      const wanted = new URLSearchParams(location.hash.slice(1)).get("layer");
      if (wanted !== null) choose(parseIndex(wanted, layers.length), true);
    });
    for (const form of document.querySelectorAll(".filters")) form.addEventListener("submit", (event) => event.preventDefault());
  }

  // --- logged values, and the layer
  const scalars = data.logged.map((chart) => [chart.title, `${chart.title} against step`, () => {
    const values = chart.curves.flatMap((curve) => records(curve, curve.steps, curve.run, "logged", false));
    return { ...structuredClone(chart.spec), data: { values } };
  }]);
  const jobs = layers.length ? [look()] : [];
  if (scalars.length) jobs.push(drawAll(place("scalars"), scalars));
  Promise.all(jobs).then(() => { document.documentElement.dataset.ready = "true"; });
  // Unlike a refresh by the browser, a reload keeps the selection in the address, and the scroll position.
  const again = document.querySelector("meta[name=reload]");
  if (again) setTimeout(() => location.reload(), 1000 * Number(again.content));
})();
