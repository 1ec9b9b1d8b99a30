"use strict";

// Tables: a click on a head sorts by that column, another one the other way round; empty values stay last.
function sortBy(head) {
  const rows = [...head.closest("table").tBodies[0].rows];
  const column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.cells[column];
    if (cell.tagName === "TH") return cell.textContent;
    return cell.hasAttribute("data-value") ? Number(cell.dataset.value) : null;
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  rows.sort((first, second) => {
    const [a, b] = [key(first), key(second)];
    if (a === null || b === null) return (a === null) - (b === null);
    return descending ? compare(b, a) : compare(a, b);
  });
  head.closest("table").tBodies[0].append(...rows);
}
for (const head of document.querySelectorAll(".sortable thead th")) {
  head.querySelector("button").addEventListener("click", () => sortBy(head));
}

// The filter of a table: rows that hold all words stay.
for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = document.getElementById(input.dataset.filter).querySelectorAll("tbody tr");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

// Method chips: what belongs to other methods fades in all plots and tables.
const chips = [...document.querySelectorAll(".chips button[data-pick]")];
function highlight() {
  const chosen = new Set(chips.filter((chip) => chip.ariaPressed === "true").map((chip) => chip.dataset.pick));
  document.body.classList.toggle("chosen", chosen.size > 0);
  for (const part of document.querySelectorAll("svg [data-method], tr[data-method]")) {
    part.classList.toggle("on", chosen.has(part.dataset.method));
  }
}
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.ariaPressed = String(chip.ariaPressed !== "true");
    highlight();
  });
}

// Tabs: one of several figures of the same thing is shown.
for (const tabs of document.querySelectorAll(".tabs")) {
  const buttons = [...tabs.querySelectorAll("button")];
  const show = (chosen) => {
    for (const button of buttons) {
      button.ariaPressed = String(button === chosen);
      document.getElementById(button.dataset.show).hidden = button !== chosen;
    }
  };
  for (const button of buttons) button.addEventListener("click", () => show(button));
}
