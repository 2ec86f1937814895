"use strict";
// Shared by all reports: the theme, the style of charts, and tables with sorting and filters.
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  // --- theme: the system's, unless selected. Charts use currentColor, so they need not be drawn again.
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const remembered = () => {
    try { return localStorage.getItem("batchnorm-theme"); } catch { return null; }
  };
  const setTheme = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    try { localStorage.setItem("batchnorm-theme", theme); } catch { /* a page opened from disk may have no storage */ }
  };
  button.hidden = false;
  setTheme(themes.includes(remembered()) ? remembered() : "auto");
  button.addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? "auto";
    setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
  });

  // --- print: open all details, in the light theme
  let folded = [], shown;
  addEventListener("beforeprint", () => {
    shown = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => {
    if (shown === undefined) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = shown;
    for (const details of folded) details.open = false;
  });

  // --- charts
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif";
  const line = { domainColor: "currentColor", domainOpacity: 0.35, tickColor: "currentColor", tickOpacity: 0.35 };
  const config = {
    background: "transparent",
    font,
    view: { stroke: null },
    axis: {
      ...line, gridColor: "currentColor", gridOpacity: 0.1, labelColor: "currentColor", labelOpacity: 0.75,
      titleColor: "currentColor", titleOpacity: 0.75, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11,
    },
  };
  const options = { actions: false, renderer: "svg", config, tooltip: { theme: "custom" } };
  const draw = (place, spec) => window.vegaEmbed(place, spec, options).catch((error) => {
    place.textContent = "This chart could not be drawn.";
    console.error(error);
  });

  // --- a table of units: {columns, values, names}, with sorting and filters, fifty rows at a time
  const PER_PAGE = 50;
  const unitTable = (table, pager, { columns, values, names }) => {
    const state = { sort: null, descending: false, page: 0, filters: {} };
    const text = (column, row) => {
      const value = values[column.name][row];
      if (value === null) return "";
      return column.numeric ? String(value) : names[column.name][value];
    };
    const ranks = {};
    for (const column of columns.filter((entry) => !entry.numeric)) {
      const order = names[column.name].map((_, code) => code);
      order.sort((a, b) => names[column.name][a].localeCompare(names[column.name][b], "en", { numeric: true }));
      ranks[column.name] = [];
      order.forEach((code, rank) => { ranks[column.name][code] = rank; });
    }
    const key = (column, row) => {
      const value = values[column.name][row];
      return column.numeric ? value : ranks[column.name][value];
    };

    const select = () => {
      let rows = values[columns[0].name].map((_, row) => row);
      for (const [name, wanted] of Object.entries(state.filters)) {
        if (wanted !== "") rows = rows.filter((row) => String(values[name][row]) === wanted);
      }
      if (state.sort) {
        const sign = state.descending ? -1 : 1;
        rows.sort((a, b) => {
          const [x, y] = [key(state.sort, a), key(state.sort, b)];
          if (x === null || y === null) return (x === null) - (y === null) || a - b;
          return sign * (x - y) || a - b;
        });
      }
      return rows;
    };

    const status = element("span", { role: "status" });
    const previous = element("button", { type: "button", textContent: "Previous" });
    const next = element("button", { type: "button", textContent: "Next" });
    const show = () => {
      const rows = select();
      const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
      state.page = Math.min(Math.max(state.page, 0), pages - 1);
      const first = state.page * PER_PAGE;
      const shown = rows.slice(first, first + PER_PAGE);
      table.tBodies[0].replaceChildren(...shown.map((row) => element("tr", {}, ...columns.map((column) => {
        const content = text(column, row);
        const cell = element("td", { textContent: content.slice(0, 200), className: column.numeric ? "" : "text" });
        if (!column.numeric && content.length > 20) cell.title = content.slice(0, 1000);
        return cell;
      }))));
      status.textContent = rows.length ? `${first + 1} to ${first + shown.length} of ${rows.length} units` : "No units";
      previous.disabled = state.page === 0;
      next.disabled = state.page === pages - 1;
      [...table.tHead.rows[0].cells].forEach((cell, i) => {
        if (columns[i] !== state.sort) cell.removeAttribute("aria-sort");
        else cell.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      });
    };
    previous.addEventListener("click", () => { state.page -= 1; show(); });
    next.addEventListener("click", () => { state.page += 1; show(); });
    pager.replaceChildren(previous, next, status);

    table.tHead.replaceChildren(element("tr", {}, ...columns.map((column) => {
      const control = element("button", { type: "button", textContent: column.header });
      control.addEventListener("click", () => {
        state.descending = state.sort === column && !state.descending;
        state.sort = column;
        state.page = 0;
        show();
      });
      return element("th", { scope: "col", className: column.numeric ? "" : "text" }, control);
    })));

    const filter = (name, value) => { state.filters[name] = value; state.page = 0; show(); };
    show();
    return { filter };
  };

  return { data, element, draw, unitTable };
})();
