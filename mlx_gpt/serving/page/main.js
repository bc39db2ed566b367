// Starts the page.

import { ask, stopAll } from "./api.js";
import { Controls } from "./controls.js";
import { Sheets } from "./sheet.js";

const START = "The";
const key = document.getElementById("key"), view = document.getElementById("view");

async function start() {
  let models;
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    if (key.hidden) view.textContent = error.message;
    return;
  }
  key.hidden = true;
  const sheets = new Sheets(new Controls(models), START);
  view.replaceChildren(sheets.root);
  sheets.focus();
}

key.onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem("key", document.getElementById("secret").value);
  start();
};
document.addEventListener("keydown", event => { if (event.key === "Escape") stopAll(); });
start();
