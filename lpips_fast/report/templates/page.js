"use strict";
// Sorting, the filter and large pictures. The page is whole without it, but for what is said there.
(() => {
  const byId = (id) => document.getElementById(id);
  const { columns, rows, first, sortedBy } = JSON.parse(byId("data").textContent);
  const NAME = 0, FOLDER = 1, ERROR = 2, NUMBERS = 3; // where they stand in a row
  const STEP = 200; // rows that are shown, and added by "Show more"
  const body = document.querySelector("#entries > tbody");
  const heads = [...document.querySelectorAll("#entries th[data-column]")];
  const nodes = new Map([...body.rows].map((row) => [Number(row.dataset.entry), row]));
  const names = new Intl.Collator(undefined, { numeric: true });
  const byName = (a, b) => names.compare(rows[a][NAME], rows[b][NAME]) || a - b;
  const numbers = columns.map((_, column) => rows.map((row) => number(row[NUMBERS + column])));
  const texts = rows.map((row) => row.slice(0, NUMBERS).join("\n").toLowerCase());

  // -1 is the name. Of a number, the worst come first: of a distance the largest.
  const worstFirst = (column) => (column < 0 ? "ascending" : columns[column][2] ? "ascending" : "descending");
  const state = { column: sortedBy, order: worstFirst(sortedBy), shown: STEP };

  function number(text) {
    return text === "" ? NaN : text.endsWith("inf") ? (text[0] === "-" ? -Infinity : Infinity) : Number(text);
  }

  function inOrder() {
    const sign = state.order === "ascending" ? 1 : -1;
    const wanted = byId("filter").value.trim().toLowerCase();
    const folder = byId("folder")?.value ?? "";
    const onlyFailed = byId("failed")?.checked ?? false;
    const found = [];
    for (let k = 0; k < rows.length; k++) {
      if (wanted && !texts[k].includes(wanted)) continue;
      if (folder && rows[k][FOLDER] !== folder) continue;
      if (onlyFailed && !rows[k][ERROR]) continue;
      found.push(k);
    }
    if (state.column < 0) return found.sort((a, b) => sign * byName(a, b));
    const values = numbers[state.column];
    return found.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b;
      return x === y ? a - b : sign * (x < y ? -1 : 1); // what has no number comes last
    });
  }

  // A row as the template writes it, of an entry without pictures.
  function build(k) {
    const row = rows[k], node = document.createElement("tr");
    node.setAttribute("role", "row");
    node.dataset.entry = k;
    const name = document.createElement("th");
    name.className = "name";
    name.scope = "row";
    name.setAttribute("role", "rowheader");
    for (const [kind, text] of [["file", row[NAME]], ["folder", row[FOLDER]], ["error", row[ERROR]]]) {
      if (!text) continue;
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = text;
      name.append(span);
    }
    node.append(name);
    const cell = (kind, text = "") => {
      const made = document.createElement("td");
      made.className = kind;
      made.setAttribute("role", "cell");
      made.textContent = text;
      node.append(made);
      return made;
    };
    for (const kind of ["pictures", "layers"]) {
      if (body.dataset[kind]) cell(kind);
    }
    columns.forEach(([, title], column) => {
      cell("number", row[NUMBERS + column] || "–").dataset.label = title;
    });
    nodes.set(k, node);
    return node;
  }

  function show() {
    const found = inOrder();
    const shown = found.slice(0, state.shown);
    body.replaceChildren(...shown.map((k) => nodes.get(k) ?? build(k)));
    for (const head of heads) {
      if (Number(head.dataset.column) === state.column) head.setAttribute("aria-sort", state.order);
      else head.removeAttribute("aria-sort");
    }
    byId("sort").value = state.column;
    byId("direction").textContent = state.order === "ascending" ? "▲" : "▼";
    const of = found.length === rows.length ? "" : ` of ${rows.length.toLocaleString("en")}`;
    const part = shown.length < found.length ? `${shown.length.toLocaleString("en")} of ` : "";
    const by = state.column < 0 ? "name" : columns[state.column][1];
    byId("status").textContent =
      `${part}${found.length.toLocaleString("en")}${part && of ? " found," : ""}${of} pairs, by ${by}, ${state.order}`;
    byId("more").hidden = shown.length === found.length;
  }

  function sortBy(column, order) {
    Object.assign(state, { column, order, shown: STEP });
    show();
  }

  const reversed = () => (state.order === "ascending" ? "descending" : "ascending");
  for (const head of heads) {
    const column = Number(head.dataset.column);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => {
      sortBy(column, column === state.column ? reversed() : worstFirst(column));
    });
    head.replaceChildren(button);
  }
  for (const kind of ["pictures", "layers"]) {
    if (document.querySelector(`#entries td.${kind}`)) body.dataset[kind] = "yes";
  }
  byId("sort").addEventListener("change", (event) => {
    const column = Number(event.target.value);
    sortBy(column, worstFirst(column));
  });
  byId("direction").addEventListener("click", () => sortBy(state.column, reversed()));
  for (const id of ["filter", "folder", "failed"]) {
    byId(id)?.addEventListener("input", () => {
      state.shown = STEP;
      show();
    });
  }
  byId("more").addEventListener("click", () => {
    const before = state.shown;
    state.shown += STEP;
    show();
    body.rows[before].setAttribute("tabindex", "-1");
    body.rows[before].focus(); // where reading goes on
  });
  document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
  document.querySelector(".tools").hidden = false;

  // ------------------------------------------------------------------------- large pictures

  const dialog = byId("large");
  let opened = null;

  const withPictures = () => [...body.rows].filter((row) => row.querySelector(".strip"));

  function enlarge(row) {
    opened = row;
    const k = Number(row.dataset.entry);
    const named = rows[k][FOLDER] ? `${rows[k][NAME]}, ${rows[k][FOLDER]}` : rows[k][NAME];
    byId("large-name").textContent = named;
    const panels = row.querySelectorAll(".panel");
    byId("large-pictures").replaceChildren(...[...panels].map((panel) => panel.cloneNode(true)));
    const list = document.createElement("dl");
    columns.forEach(([, title], column) => {
      const line = document.createElement("div");
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = title;
      value.textContent = rows[k][NUMBERS + column] || "–";
      line.append(term, value);
      list.append(line);
    });
    const layers = row.querySelector(".layers svg");
    byId("large-numbers").replaceChildren(list, ...(layers ? [layers.cloneNode(true)] : []));
    const all = withPictures(), place = all.indexOf(row);
    byId("previous").disabled = place <= 0;
    byId("next").disabled = place >= all.length - 1;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }

  function step(by) {
    const all = withPictures();
    const row = all[all.indexOf(opened) + by];
    if (row) enlarge(row);
  }

  body.addEventListener("click", (event) => {
    const strip = event.target.closest(".strip");
    if (strip) enlarge(strip.closest("tr"));
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  dialog.addEventListener("close", () => opened?.querySelector(".strip")?.focus());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (dialog.open) {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    } else if (event.key === "/" && !event.target.matches("input, select")) {
      event.preventDefault();
      byId("filter").focus();
    }
  });

  show();
})();
