"use strict";
const form = document.querySelector("form");
const buttons = [...form.querySelectorAll("button")];
const search = form.querySelector("input");
const count = form.querySelector("output");
const cards = [...document.querySelectorAll("article")];
let texts = null;
let waiting = 0;

function filter() {
  const status = buttons.find((button) => button.ariaPressed === "true").value;
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && texts === null) texts = cards.map((card) => card.textContent.toLowerCase());
  let shown = 0;
  cards.forEach((card, place) => {
    const fits = (!status || card.dataset.status === status) && words.every((word) => texts[place].includes(word));
    if (card.hidden === fits) card.hidden = !fits;
    shown += fits;
  });
  count.value = shown === cards.length ? "" : `${shown.toLocaleString()} of ${cards.length.toLocaleString()}`;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    for (const other of buttons) other.ariaPressed = String(other === button);
    filter();
  });
}
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(filter, 120);
});
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
