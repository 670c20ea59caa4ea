"use strict";
(() => {
  const table = document.getElementById("summary");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];

  // Missing values stay last in both directions; numbers compare as numbers, the rest as words.
  function compare(a, b) {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  function sortBy(column) {
    const header = headers[column];
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const keyed = [...body.rows].map((row) => [row.cells[column].dataset.sort ?? "", row]);
    keyed.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b)));
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    body.append(...keyed.map(([, row]) => row));
  }

  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => sortBy(column)));

  // Finding a concept hides the other rows of the table and the other sections.
  const find = document.getElementById("find");
  const count = document.getElementById("count");
  find?.addEventListener("input", () => {
    const words = find.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of body.rows) {
      const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      document.querySelector(row.querySelector("a").hash).hidden = row.hidden;
      shown += !row.hidden;
    }
    count.textContent = shown < body.rows.length ? `${shown} of ${body.rows.length} concepts shown` : "";
  });

  // A link to a folded row unfolds it.
  function unfold() {
    const row = location.hash.startsWith("#row-") && document.querySelector(location.hash);
    if (row) row.querySelector("details").open = true;
  }
  addEventListener("hashchange", unfold);
  unfold();
})();
