"use strict";
// Sorting, folding and pointing; the page reads the same without it.

for (const button of document.querySelectorAll("table.data thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const rising = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !head.classList.contains("number"));
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.sort;
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.every((row) => /^(-?inf|nan|-?[\d.]+(e[-+]?\d+)?)$/i.test(key(row)));
  const value = (row) => (numeric ? Number(key(row).replace(/inf/i, "Infinity")) : key(row));
  const last = (entry) => Number.isNaN(entry) || entry === -Infinity; // unknown values stay at the end
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (last(x) || last(y)) return last(x) - last(y);
    const order = numeric ? x - y : x.localeCompare(y);
    return rising ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

const cards = [...document.querySelectorAll(".card")];
const unfold = document.getElementById("unfold");
unfold.addEventListener("click", () => {
  const open = unfold.getAttribute("aria-pressed") !== "true";
  for (const card of cards) card.open = open;
  unfold.setAttribute("aria-pressed", String(open));
  unfold.textContent = open ? "Fold all" : "Unfold all";
});

document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    const found = card.textContent.toLowerCase().includes(wanted);
    card.hidden = !found;
    count += found;
  }
  document.getElementById("shown").textContent = wanted ? `${count} of ${cards.length}` : "";
});

// A link to a feature opens its description.
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  target.hidden = false;
  target.scrollIntoView();
}
window.addEventListener("hashchange", openTarget);
openTarget();

// Printing shows everything.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});

// Pointing at a node of the circuit, or reaching it with the keyboard, leaves only its edges.
const circuit = document.querySelector("svg.circuit");
if (circuit) {
  const edges = [...circuit.querySelectorAll('g[id^="circuit-edge-"]')];
  for (const node of circuit.querySelectorAll('g[id^="circuit-node-"]')) {
    const number = node.id.slice("circuit-node-".length);
    const touching = edges.filter((edge) => edge.id.split("-").slice(2).includes(number));
    const light = (on) => {
      circuit.classList.toggle("focused", on);
      for (const edge of touching) edge.classList.toggle("lit", on);
    };
    const reached = node.closest("a") ?? node;
    for (const [start, end] of [["pointerenter", "pointerleave"], ["focus", "blur"]]) {
      reached.addEventListener(start, () => light(true));
      reached.addEventListener(end, () => light(false));
    }
  }
}
