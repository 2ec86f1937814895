// A map of rows × steps on a canvas: fast with tens of thousands of cells, for pointer and keyboard.
const heatmap = (canvas, tip, status, choose) => {
  const ROW = 17, AXIS = 26, FONT = "11px system-ui, sans-serif";
  // Lightness changes evenly from that of the page: readable without hues, on white and on black.
  const COLOURS = {
    light: {
      sequential: ["#eeeee6", "#c3d6ea", "#86b2d8", "#4288c0", "#1c5f9e", "#08306b"],
      diverging: ["#8a4303", "#cf7a1d", "#f0bd7d", "#f1f0ea", "#bdb8da", "#8073ac", "#452078"],
    },
    dark: {
      sequential: ["#22262b", "#16385c", "#1f5f98", "#4a8fca", "#8fbfe6", "#dceeff"],
      diverging: ["#ffc27a", "#d08534", "#6e4620", "#26292e", "#443f72", "#8073c6", "#cabfff"],
    },
  };
  const SCALES = {
    diverging: { colours: "diverging", at: (v) => (v + 1) / 2, ticks: [[0, "-1 or less"], [0.5, "0: bare"], [1, "1: undone"]] },
    share: { colours: "sequential", at: (v) => v, ticks: [[0, "0%"], [0.5, "50%"], [1, "100%"]] },
    decades: { colours: "sequential", at: (v) => (Math.log10(v) + 2) / 3, ticks: [[0, "0.01"], [1 / 3, "0.1"], [2 / 3, "1"], [1, "10"]] },
  };
  const context = canvas.getContext("2d");
  const drawn = document.createElement("canvas");
  let shown = null, chosen = 0, cursor = null, size = null;

  const dark = () => {
    const parts = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g).map(Number);
    return parts[0] + parts[1] + parts[2] < 384;
  };
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const ramp = (stops) => Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    const [a, b] = [rgb(stops[low]), rgb(stops[low + 1])];
    return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (place - low))).join(",")})`;
  });
  const colours = () => ramp(COLOURS[dark() ? "dark" : "light"][SCALES[shown.scale].colours]);

  const measure = () => {
    const width = canvas.parentElement.clientWidth;
    const label = Math.round(Math.min(210, width * 0.34));
    const height = shown.rows.length * ROW + AXIS;
    return { width, height, label, plot: width - label - 8 };
  };
  const across = (step) => size.label + (size.plot * Math.log1p(step)) / Math.log1p(Math.max(shown.last, 1));
  const edges = () => {
    const at = shown.steps.map(across);
    const between = at.slice(1).map((x, i) => (x + at[i]) / 2);
    return [size.label, ...between, size.label + size.plot];
  };
  const prepare = (surface, to) => {
    const ratio = window.devicePixelRatio || 1;
    surface.width = Math.round(size.width * ratio);
    surface.height = Math.round(size.height * ratio);
    to.setTransform(ratio, 0, 0, ratio, 0, 0);
  };

  const drawCells = () => {
    const to = drawn.getContext("2d"), palette = colours(), at = SCALES[shown.scale].at;
    const style = getComputedStyle(document.body);
    prepare(drawn, to);
    to.clearRect(0, 0, size.width, size.height);
    const x = edges();
    shown.values.forEach((row, r) => {
      if (!row) return;
      for (let c = 0; c < shown.steps.length; c++) {
        const value = row[c];
        if (Number.isNaN(value)) continue;
        const share = Math.min(Math.max(at(value), 0), 1);
        to.fillStyle = palette[Math.round(255 * share)];
        to.fillRect(x[c], r * ROW + 0.5, x[c + 1] - x[c] + 0.4, ROW - 1);
      }
    });
    to.font = FONT;
    to.textBaseline = "middle";
    to.fillStyle = style.color;
    shown.rows.forEach((name, r) => {
      let text = name;
      for (let letters = name.length - 1; letters > 3 && to.measureText(text).width > size.label - 14; letters--) {
        const head = Math.floor(letters / 2);
        text = `${name.slice(0, head)}…${name.slice(name.length - (letters - head))}`;
      }
      to.textAlign = "right";
      to.fillText(text, size.label - 8, r * ROW + ROW / 2);
    });
    to.globalAlpha = 0.7;
    to.textAlign = "center";
    let free = -Infinity;
    for (let step = 0; step <= shown.last; step = step ? step * 10 : 1) {
      const text = step < 1000 ? String(step) : `${step / 1000}k`, place = across(step);
      if (place < free || place > size.width - 8) continue;
      to.fillText(text, Math.max(place, size.label + 4), size.height - AXIS / 2);
      free = place + 30;
    }
    to.globalAlpha = 1;
  };

  const overlay = () => {
    prepare(canvas, context);
    context.drawImage(drawn, 0, 0, size.width, size.height);
    context.strokeStyle = context.fillStyle = getComputedStyle(document.body).color;
    context.lineWidth = 1.5;
    context.strokeRect(size.label, chosen * ROW, size.plot, ROW);
    context.beginPath();
    context.moveTo(size.label - 6, chosen * ROW + 4);
    context.lineTo(size.label - 1, chosen * ROW + ROW / 2);
    context.lineTo(size.label - 6, chosen * ROW + ROW - 4);
    context.fill();
    if (cursor) {
      const x = edges();
      context.lineWidth = 2;
      context.strokeRect(x[cursor.column] - 2, cursor.row * ROW - 1, Math.max(x[cursor.column + 1] - x[cursor.column], 3) + 4, ROW + 2);
    }
  };

  const words = ({ row, column }) => {
    const value = shown.values[row] ? shown.values[row][column] : NaN;
    const text = Number.isNaN(value) ? "unknown" : shown.scale === "share" ? `${Number((100 * value).toPrecision(3))}%` : String(Number(value.toPrecision(3)));
    return `${shown.rows[row]}, step ${shown.steps[column].toLocaleString("en")}: ${shown.title} ${text}`;
  };
  const point = (at, spoken) => {
    cursor = at;
    if (at && spoken) status.textContent = words(at);
    overlay();
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const row = Math.floor(y / ROW);
    if (row < 0 || row >= shown.rows.length || !shown.steps.length) return null;
    const column = edges().findLastIndex((edge) => edge <= x);
    return { row, column: Math.min(Math.max(column, 0), shown.steps.length - 1), x, y };
  };

  canvas.addEventListener("pointermove", (event) => {
    const at = under(event);
    point(at, false);
    tip.hidden = !at;
    if (!at) return;
    tip.textContent = words(at);
    const room = size.width - tip.offsetWidth;
    tip.style.left = `${Math.max(Math.min(at.x + 14, room), 0)}px`;
    tip.style.top = `${(at.row + 1) * ROW + 6}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; point(null, false); });
  canvas.addEventListener("click", (event) => { const at = under(event); if (at) choose(at.row); });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity] };
    const end = shown.steps.length - 1;
    if (end < 0) return;
    const now = cursor ?? { row: chosen, column: end };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      const limit = (value, most) => Math.min(Math.max(value, 0), most);
      point({ row: limit(now.row + down, shown.rows.length - 1), column: limit(now.column + right, end) }, true);
    } else if (event.key === "Enter" || event.key === " ") choose(now.row);
    else return;
    event.preventDefault();
  });

  const legend = (place) => {
    const { ticks } = SCALES[shown.scale];
    const { element } = report;
    const bar = element("div", { className: "bar" });
    bar.style.background = `linear-gradient(to right, ${colours().filter((_, i) => i % 15 === 0).join(",")})`;
    const marks = ticks.map(([at, text]) => {
      const mark = element("span", { textContent: text });
      mark.style.left = `${100 * at}%`;
      return mark;
    });
    place.replaceChildren(element("div", { className: "ramp" }, bar, element("div", { className: "marks" }, ...marks)),
      element("span", { textContent: "empty: unknown" }));
  };

  const redraw = () => {
    if (!shown || !canvas.parentElement.clientWidth) return;  // no width, as in a closing tab: nothing to draw
    size = measure();
    canvas.style.width = `${size.width}px`;
    canvas.style.height = `${size.height}px`;
    drawCells();
    overlay();
    legend(document.getElementById("scale"));
  };
  new ResizeObserver(redraw).observe(canvas.parentElement);
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  return {
    show: (next) => { shown = next; cursor = null; redraw(); },
    mark: (row) => { chosen = row; if (shown) overlay(); },
  };
};
