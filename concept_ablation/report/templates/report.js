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
  // Which pictures of a probe: the first ones, or those that count most against the row.
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-which]");
    if (!button) return;
    for (const other of button.parentElement.children) other.ariaPressed = String(other === button);
    const probe = button.closest(".probe"), worst = button.dataset.which === "worst", told = probe.querySelector(".of");
    probe.querySelector(".strip").classList.toggle("by-worst", worst);
    told.dataset.first ??= told.textContent;
    told.textContent = worst ? told.dataset.worst : told.dataset.first;
  });

  // One picture enlarged: a slider between before and after, arrow keys over the strip's seeds. What is veiled stays so until asked for.
  const zoom = document.getElementById("zoom");
  const part = (selector) => zoom.querySelector(selector);
  const slider = part("input[type=range]");
  const stage = part(".stage");
  let shown = null; // the figure that is enlarged

  const inStrip = () => [...shown.parentElement.querySelectorAll("figure")].filter((figure) => figure.offsetParent)
    .sort((a, b) => Number(getComputedStyle(a).order) - Number(getComputedStyle(b).order));

  // The same picture in full size, once it is there; a page without its folder keeps the thumbnail.
  function fullSize(image, figure, file, position) {
    const key = file.split("/").at(-1).replace(/\.parquet$/, "");
    const full = new Image();
    full.onload = () => { if (shown === figure) image.src = full.src; };
    full.src = `${zoom.dataset.full}/${encodeURIComponent(`${key}.${position}.webp`)}`;
  }

  function enlarge(figure) {
    shown = figure;
    const { values = [], where = [] } = JSON.parse(figure.dataset.more);
    const check = figure.querySelector(".veil input");
    const name = figure.closest(".probe").querySelector("h3, h4").textContent.trim().replace(/\s+/g, " ");
    const badge = figure.querySelector(".badge")?.textContent;
    part("h2").textContent = `${name}, seed ${figure.dataset.seed}${badge ? `: ${badge}` : ""}`;
    part("#zoom-prompt").textContent = figure.dataset.prompt;
    stage.querySelectorAll("img").forEach((image, number) => {
      image.src = figure.querySelectorAll("img")[number].src;
      if (where[number] && zoom.dataset.full && !check) fullSize(image, figure, ...where[number]);
    });
    part(".unveil").hidden = !check;
    part(".unveil input").checked = check?.checked || Boolean(figure.closest(".fold").querySelector(".reveal:checked"));
    stage.classList.toggle("veiled", Boolean(check) && !part(".unveil input").checked);
    part("table").hidden = !values.length;
    part("tbody").replaceChildren(...values.map(([name, ...cells]) => {
      const line = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name.replaceAll("_", " ");
      line.append(head, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return line;
    }));
    part(".original").hidden = !where.length;
    part("pre code").textContent = ["from concept_ablation.common.image_store import read_store", ...where.map(([file, position], number) =>
      `read_store("${zoom.dataset.results}/${file}").image(${position}).save("${number ? "after" : "before"}.png")`)].join("\n");
    const all = inStrip();
    part("[data-step='-1']").disabled = all[0] === figure;
    part("[data-step='1']").disabled = all.at(-1) === figure;
    if (!zoom.open) zoom.showModal();
  }

  function step(by) {
    const all = inStrip();
    const next = all[all.indexOf(shown) + by];
    if (next) enlarge(next);
  }

  document.addEventListener("click", (event) => {
    const figure = event.target.closest(".strip figure");
    if (figure && (event.target.closest("[data-zoom]") || (event.target.matches("img") && !event.target.closest(".veil")))) enlarge(figure);
  });
  zoom.addEventListener("click", (event) => {
    const by = event.target.closest("[data-step]")?.dataset.step;
    if (by) step(Number(by));
    else if (event.target === zoom) zoom.close(); // beside it
  });
  zoom.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target === slider) return;
    event.preventDefault();
    step(by);
  });
  slider.addEventListener("input", () => stage.style.setProperty("--cut", `${slider.value}%`));
  part(".unveil input").addEventListener("change", (event) => stage.classList.toggle("veiled", !event.target.checked));

  // Text is copied from the element that a button names; where the browser forbids that, it is selected.
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = document.querySelector(button.dataset.copy) ?? button.closest("details, section").querySelector(button.dataset.copy);
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(source.textContent.trim());
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = said; }, 1500);
  });

  addEventListener("hashchange", restore);
  addEventListener("popstate", restore);
  addEventListener("load", () => show(placeOf(location.hash)));
  addEventListener("DOMContentLoaded", () => { if (sorted.column !== first || sorted.down) sort(); restore(); });
  if (location.hash.includes("?")) restore(); // the table at once, before the rows below are read
})();
