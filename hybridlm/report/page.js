"use strict";
// Sorting and the theme; the page is whole without them.

const say = (text) => { document.getElementById("status").textContent = text; };

// numbers by value, text as people sort it, empty cells last whichever way
function compare(a, b, column, sign) {
  const [x, y] = [a.cells[column], b.cells[column]];
  const [p, q] = [x.dataset.sort, y.dataset.sort];
  if (p !== undefined && q !== undefined) return sign * (Number(p) - Number(q));
  if (p !== undefined || q !== undefined) return p !== undefined ? -1 : 1;
  return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
}

function sortBy(table, head) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(a, b, head.cellIndex, up ? 1 : -1)));
  say(`Sorted by ${head.textContent}, ${up ? "ascending" : "descending"}`);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  }
}

const root = document.documentElement;
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const show = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  show();
});
system.addEventListener("change", show);
theme.hidden = false;
show();
