// Controls of a page of sections. Without this script everything is shown, in the order of the page.
(() => {
  "use strict";
  const all = (root, selector) => [...root.querySelectorAll(selector)];

  // Tables: one whose values are too long for the page becomes a list, as those of many columns always are.
  const fit = () => {
    for (const table of all(document, ".scroll > table:not(.stack), .scroll > table[data-stacked]")) {
      table.classList.remove("stack");
      const wide = table.parentElement.scrollWidth > table.parentElement.clientWidth + 1;
      table.classList.toggle("stack", wide);
      table.toggleAttribute("data-stacked", wide);
    }
  };
  window.addEventListener("resize", fit);
  fit();

  // Tables: a heading is a button that sorts by its column.
  for (const table of all(document, "table[data-sortable]")) {
    table.classList.add("sorts");
    const headings = all(table.tHead, "th");
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const rows = [...table.tBodies[0].rows];
        const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
        const numeric = rows.every((row) => Number.isFinite(Number(key(row))));
        // Numbers begin with the largest, words with the first of the alphabet.
        const direction = { ascending: "descending", descending: "ascending" }[heading.getAttribute("aria-sort")]
          ?? (numeric ? "descending" : "ascending");
        const sign = direction === "ascending" ? 1 : -1;
        const compare = numeric
          ? (a, b) => Number(key(a)) - Number(key(b))
          : (a, b) => key(a).localeCompare(key(b), undefined, { numeric: true });
        rows.sort((a, b) => sign * compare(a, b));
        table.tBodies[0].append(...rows);
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", direction);
      });
    });
  }

  // Tables: a row is shown where it agrees with every choice.
  for (const controls of all(document, "[data-filters]")) {
    const table = document.getElementById(controls.dataset.filters);
    const choices = all(controls, "select");
    const status = controls.querySelector("[role=status]");
    const update = (speak) => {
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        row.hidden = !choices.every((choice, i) => choice.value === "" || row.dataset[`filter${i}`] === choice.value);
        shown += !row.hidden;
      }
      if (speak) status.textContent = `${shown} of ${table.tBodies[0].rows.length}`;
    };
    for (const choice of choices) choice.addEventListener("change", () => update(true));
    controls.hidden = false;
    update(true);
  }

  // Galleries: one item at a time.
  for (const gallery of all(document, "[data-gallery]")) {
    const items = all(gallery, "[data-tags]");
    const [filter, chooser] = all(gallery, "select");
    const [previous, next] = all(gallery, "button");
    const status = gallery.querySelector("[role=status]");
    let listed = items;
    let current = 0;
    const show = (index) => {
      current = (index + listed.length) % listed.length;
      for (const item of items) item.hidden = item !== listed[current];
      chooser.value = listed[current].id;
      status.textContent = `${current + 1} of ${listed.length}`;
    };
    const list = (tag) => {
      filter.value = tag;
      listed = items.filter((item) => tag === "" || item.dataset.tags.split(" ").includes(tag));
      chooser.replaceChildren(...listed.map((item) => new Option(item.querySelector("h3").textContent, item.id)));
    };
    filter.addEventListener("change", () => { list(filter.value); show(0); });
    chooser.addEventListener("change", () => show(listed.findIndex((item) => item.id === chooser.value)));
    previous.addEventListener("click", () => show(current - 1));
    next.addEventListener("click", () => show(current + 1));
    const follow = () => {
      const item = items.find((candidate) => `#${candidate.id}` === location.hash);
      if (!item) return;
      list("");
      show(items.indexOf(item));
      item.scrollIntoView();
      item.focus({ preventScroll: true });
    };
    window.addEventListener("hashchange", follow);
    // A link to the row that the address names already changes nothing there, but may have to show it again.
    document.addEventListener("click", (event) => {
      const link = event.target.closest?.("a[href^='#']");
      if (link && link.getAttribute("href") === location.hash) follow();
    });
    for (const details of all(gallery, "details")) details.open = true;
    gallery.querySelector(".controls").hidden = false;
    gallery.classList.add("live");
    list("");
    show(0);
    follow();
  }
})();
