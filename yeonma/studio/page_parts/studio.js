"use strict";
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = button.dataset.done;
    } else { // browsers copy only on secure pages: the text is marked instead
      getSelection().selectAllChildren(text);
    }
  });
}
const borders = document.getElementById("borders");
if (borders) {
  borders.addEventListener("change", () => document.body.classList.toggle("tokens", borders.checked));
}
const live = document.querySelector("[data-events]");
if (live) {
  // the server sends parts of this page by their ids, as it would write them into the page
  new EventSource(live.dataset.events).addEventListener("message", (event) => {
    for (const [id, content] of Object.entries(JSON.parse(event.data))) {
      const part = document.getElementById(id);
      const made = document.createElement("template");
      made.innerHTML = content;
      // what is the same stays: a button that was replaced between press and release would lose its click
      if (part && part.innerHTML !== made.innerHTML) {
        part.replaceChildren(made.content);
      }
    }
  });
}
