"use strict";
(() => {
  const table = document.getElementById("summary");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const lines = [...body.rows].filter((line) => line.dataset.row);
  const find = document.getElementById("find");
  const buttons = [...document.querySelectorAll("[data-filter]")];
  const points = new Map(Array.from(document.querySelectorAll(".point"), (point) => [point.dataset.row, point]));
  const count = document.getElementById("count");
  const first = headers.findIndex((header) => header.ariaSort);
  const sorted = { column: first, down: false };
  const sectionOf = (line) => document.getElementById(line.dataset.row); // null until the page is read to there

  // A folded row is text until it is opened: a thousand rows would else be a million elements.
  function fill(fold) {
    const text = fold.querySelector(":scope > script");
    if (!text) return;
    const content = document.createElement("template");
    content.innerHTML = text.textContent;
    text.replaceWith(content.content);
  }

  function unfold(section, open = true) {
    const fold = section.querySelector("details");
    if (open) fill(fold);
    fold.open = open;
  }

  document.addEventListener("toggle", (event) => { if (event.target.open && event.target.matches(".fold")) fill(event.target); }, true);
  document.addEventListener("click", (event) => {
    const head = event.target.closest(".fold > summary");
    if (head) fill(head.parentElement);
  });

  // Missing values stay last in both directions; numbers compare as numbers, the rest as words.
  function compare(a, b) {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  function sort() {
    const sign = sorted.down ? -1 : 1;
    const keyed = lines.map((line) => [line.cells[sorted.column].dataset.sort ?? "", line]);
    keyed.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b)));
    headers.forEach((header, column) => {
      if (column === sorted.column) header.ariaSort = sorted.down ? "descending" : "ascending";
      else header.removeAttribute("aria-sort");
    });
    body.append(...keyed.map(([, line]) => line));
    document.getElementById("rows")?.append(...keyed.map(([, line]) => sectionOf(line)).filter(Boolean));
  }

  // The text is sought in names, kind, target, anchor and neighbors. Of one group of buttons any may fit, of several groups all must.
  const pressed = (name) => buttons.filter((button) => button.dataset.filter === name && button.ariaPressed === "true").map((button) => button.dataset.value);

  function filter() {
    const words = (find?.value ?? "").trim().toLowerCase().split(/\s+/);
    const wanted = [...new Set(buttons.map((button) => button.dataset.filter))].map((name) => [name, pressed(name)]).filter(([, values]) => values.length);
    let shown = 0;
    for (const line of lines) {
      const text = `${line.cells[0].textContent} ${line.dataset.find}`.toLowerCase();
      const fits = words.every((word) => text.includes(word)) && wanted.every(([name, values]) => values.includes(line.dataset[name]));
      line.hidden = !fits;
      const section = sectionOf(line);
      if (section) section.hidden = !fits;
      points.get(line.dataset.row)?.classList.toggle("out", !fits);
      shown += fits;
    }
    count.textContent = shown < lines.length ? `${shown} of ${lines.length} concepts shown` : "";
  }

  // The address: #row-3?state=failed&find=owl&sort=2-. A place, then what is shown of the table, both of them optional.
  function address(place) {
    const query = new URLSearchParams();
    for (const button of buttons) if (button.ariaPressed === "true") query.append(button.dataset.filter, button.dataset.value);
    if (find?.value.trim()) query.set("find", find.value.trim());
    if (sorted.column !== first || sorted.down) query.set("sort", `${sorted.column}${sorted.down ? "-" : ""}`);
    return `#${place}${query.size ? `?${query}` : ""}`;
  }

  const placeOf = (hash) => hash.slice(1).split("?")[0];
  const keep = () => history.replaceState(null, "", address(placeOf(location.hash)));

  function restore() {
    const query = new URLSearchParams(location.hash.split("?").slice(1).join("?"));
    for (const button of buttons) button.ariaPressed = String(query.getAll(button.dataset.filter).includes(button.dataset.value));
    if (find) find.value = query.get("find") ?? "";
    const [, column, down] = /^(\d+)(-?)$/.exec(query.get("sort") ?? "") ?? [null, first, ""];
    if (Number(column) < headers.length && (Number(column) !== sorted.column || (down !== "") !== sorted.down)) {
      Object.assign(sorted, { column: Number(column), down: down !== "" });
      sort();
    }
    filter();
    show(placeOf(location.hash));
  }

  // A link to a row, or to pictures in it, brings it back if it is filtered out, unfolds it, and only then goes there.
  function show(place) {
    const section = /^row-\d+/.test(place) && document.getElementById(/^row-\d+/.exec(place)[0]);
    if (!section) return;
    if (section.hidden) {
      if (find) find.value = "";
      for (const button of buttons) button.ariaPressed = "false";
      filter();
      keep();
    }
    unfold(section);
    document.getElementById(place)?.scrollIntoView();
  }

  function go(place) {
    const next = address(place);
    if (next !== location.hash) history.pushState(null, "", next);
    show(place);
  }

  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    Object.assign(sorted, { column, down: sorted.column === column && !sorted.down });
    sort();
    keep();
  }));
  find?.addEventListener("input", () => { filter(); keep(); });
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.ariaPressed = String(button.ariaPressed !== "true");
      filter();
      keep();
    });
  }
  for (const button of document.querySelectorAll("[data-unfold]")) {
    button.addEventListener("click", () => {
      for (const line of lines) {
        const section = sectionOf(line);
        if (section && !section.hidden) unfold(section, button.dataset.unfold !== "");
      }
    });
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#row-'], .overview-plot [data-row]");
    if (!link) return;
    event.preventDefault();
    go(link.dataset.row ?? link.hash.slice(1));
  });
  const told = document.getElementById("point");
  document.querySelector(".overview-plot")?.addEventListener("pointerover", (event) => {
    const point = points.get(event.target.closest("[data-row]")?.dataset.row);
    if (point) told.textContent = point.dataset.text;
  });
  addEventListener("hashchange", restore);
  addEventListener("popstate", restore);
  addEventListener("load", () => show(placeOf(location.hash)));
  addEventListener("DOMContentLoaded", () => { if (sorted.column !== first || sorted.down) sort(); restore(); });
  if (location.hash.includes("?")) restore(); // the table at once, before the rows below are read
})();
