"use strict";
// Tables sort by their buttons; plots read out the values under the pointer and the arrow keys.

function byValue(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function sortTable(table) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.textContent === "–" ? null : cell.textContent;
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort((a, b) => (a[0] === null || b[0] === null || up ? 1 : -1) * byValue(a[0], b[0]));
    body.append(...rows.map(([, row]) => row));
  }));
}

function readPlot(figure) {
  const plot = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), reading = figure.querySelector(".reading");
  const places = [...new Set(plot.series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", plot.top);
  cursor.setAttribute("y2", plot.bottom);
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    const where = plot.left + (x - plot.x_from) / (plot.x_to - plot.x_from) * (plot.right - plot.left);
    cursor.setAttribute("x1", where);
    cursor.setAttribute("x2", where);
    svg.append(cursor);
    const parts = plot.series.filter((one) => one.x.includes(x)).map((one) =>
      `${plot.series.length > 1 ? one.name + " " : ""}${one.y[one.x.indexOf(x)].toLocaleString("en", { maximumSignificantDigits: 5 })}`);
    const name = plot.x_names[x] ?? x.toLocaleString("en", { maximumFractionDigits: 1 });
    reading.textContent = `${plot.x_label} ${name}: ${parts.join(" · ")}`;
  }

  if (!places.length) return;
  figure.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const inside = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = plot.x_from + (inside - plot.left) / (plot.right - plot.left) * (plot.x_to - plot.x_from);
    show(places.reduce((best, place, i) => Math.abs(place - x) < Math.abs(places[best] - x) ? i : best, 0));
  });
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (step === undefined && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    show(event.key === "Home" ? 0 : event.key === "End" ? places.length - 1 : at + step);
  });
}

document.querySelectorAll("table.sortable").forEach(sortTable);
document.querySelectorAll("figure.plot").forEach(readPlot);
