"use strict";
(() => {
  const say = (text) => { document.getElementById("said").textContent = text; };

  // theme: what the system prefers until a choice is made
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    say(`${root.dataset.theme} theme`);
  });

  // a table that sorts by its headings
  const value = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent.trim().toLowerCase() : number === "" ? NaN : Number(number);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") {
      if (Number.isNaN(a)) return Number.isNaN(b) ? 0 : 1; // what has no value comes last either way
      if (Number.isNaN(b)) return -1;
      return a - b;
    }
    return String(a).localeCompare(String(b));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows];
        rows.sort((x, y) => {
          const a = value(x, column), b = value(y, column);
          const blank = Number.isNaN(a) || Number.isNaN(b);
          return down && !blank ? compare(b, a) : compare(a, b);
        });
        body.append(...rows);
        say(`sorted by ${button.textContent}, ${down ? "descending" : "ascending"}`);
      });
    });
  }

  // filter by words and by stage
  const words = document.getElementById("filter"), stage = document.getElementById("stage");
  const filter = () => {
    const wanted = words.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    const rows = document.querySelectorAll("#leaderboard tbody tr");
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      const fits = wanted.every((w) => text.includes(w)) && (!stage.value || row.dataset.stage === stage.value);
      row.classList.toggle("hidden", !fits);
      shown += fits ? 1 : 0;
    });
    document.getElementById("count").textContent = `${shown} of ${rows.length}`;
  };
  if (words) { words.addEventListener("input", filter); stage.addEventListener("change", filter); }

  // copy a recipe
  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea"); // a page opened from a file has no clipboard of its own
    area.value = text;
    area.style.position = "fixed";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done ? undefined : Promise.reject(new Error("not allowed"));
  };
  const recipes = JSON.parse(document.getElementById("recipes").textContent);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-copy]");
    if (!button) return;
    const text = recipes[button.dataset.copy];
    try {
      await copy(text);
      say(`recipe of ${button.dataset.copy} copied`);
      button.textContent = "Copied";
    } catch (error) {
      say("copying was not allowed: select the text under Recipe");
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = "Copy recipe"; }, 1500);
  });
})();
