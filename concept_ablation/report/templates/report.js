"use strict";
(() => {
  const body = document.getElementById("summary").tBodies[0];
  const headers = [...document.querySelectorAll("#summary thead th")];
  const sections = document.getElementById("rows");
  const section = new Map(); // a line of the table -> the section that it links to
  for (const line of body.rows) {
    const link = line.querySelector("a");
    if (link) section.set(line, document.getElementById(link.hash.slice(1)));
  }

  // Missing values stay last in both directions; numbers compare as numbers, the rest as words.
  function compare(a, b) {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  function sortBy(column) {
    const header = headers[column];
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const keyed = [...section.keys()].map((line) => [line.cells[column].dataset.sort ?? "", line]);
    keyed.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b)));
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    body.append(...keyed.map(([, line]) => line));
    sections.append(...keyed.map(([, line]) => section.get(line)));
  }

  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => sortBy(column)));

  // The text is sought in names, kind, target, anchor and neighbors; verdicts have buttons. What is filtered out is hidden below, too.
  const find = document.getElementById("find");
  const verdicts = [...document.querySelectorAll("[data-verdict][aria-pressed]")];
  const count = document.getElementById("count");

  function filter() {
    const words = (find?.value ?? "").trim().toLowerCase().split(/\s+/);
    const wanted = verdicts.filter((button) => button.ariaPressed === "true").map((button) => button.dataset.verdict);
    let shown = 0;
    for (const [line, below] of section) {
      const text = `${line.cells[0].textContent} ${line.dataset.find}`.toLowerCase();
      const fits = words.every((word) => text.includes(word));
      line.hidden = below.hidden = !fits || (wanted.length > 0 && !wanted.includes(line.dataset.verdict));
      shown += !line.hidden;
    }
    count.textContent = shown < section.size ? `${shown} of ${section.size} concepts shown` : "";
  }

  find?.addEventListener("input", filter);
  for (const button of verdicts) {
    button.addEventListener("click", () => {
      button.ariaPressed = button.ariaPressed !== "true";
      filter();
    });
  }
  for (const button of document.querySelectorAll("[data-unfold]")) {
    button.addEventListener("click", () => {
      for (const below of section.values()) {
        if (!below.hidden) below.querySelector("details").open = button.dataset.unfold !== "";
      }
    });
  }

  // A link to a row, or to pictures in it, brings it back if it is filtered out, unfolds it, and only then goes there.
  function show(hash) {
    const place = hash.startsWith("#row-") && document.getElementById(hash.slice(1));
    if (!place) return;
    const below = place.closest("section.row");
    if (below.hidden) {
      if (find) find.value = "";
      for (const button of verdicts) button.ariaPressed = "false";
      filter();
    }
    below.querySelector("details").open = true;
    place.scrollIntoView();
  }
  addEventListener("hashchange", () => show(location.hash));
  addEventListener("load", () => show(location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#row-']");
    if (link) show(link.hash);
  });
})();
