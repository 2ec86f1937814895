"use strict";
(() => {
  const { data, element, draw, unitTable } = report;
  const drawn = [...document.querySelectorAll("[data-chart]")].map((place) =>
    draw(place, data.charts[place.dataset.chart]));
  Promise.all(drawn).then(() => { document.documentElement.dataset.ready = "true"; });

  const table = document.getElementById("unit-table");
  if (!table) return;
  const { filter } = unitTable(table, document.getElementById("pager"), data.units);
  const { columns, values, names } = data.units;
  for (const column of columns.filter((entry) => ["arm", "layer", "seed", "class"].includes(entry.name))) {
    const { name } = column;
    const options = [...new Set(values[name])].filter((value) => value !== null);
    const choice = element("select", {}, element("option", { value: "", textContent: "all" }), ...options.map((value) => {
      const label = column.numeric ? String(value) : names[name][value];
      return element("option", { value: String(value), textContent: label.slice(0, 60) });
    }));
    choice.addEventListener("change", () => filter(name, choice.value));
    document.getElementById("filters").append(element("label", {}, name, choice));
  }
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
})();
