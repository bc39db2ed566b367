// Starts the page, and switches between its two views.

import { ask, stopAll } from "./api.js";
import { Controls } from "./controls.js";
import { Conversation } from "./conversation.js";
import { Sheets } from "./sheet.js";
import { keep, kept } from "./storage.js";

const START = "The";
const VIEW = "mlx-gpt view";
const PURPOSE = {
  sheet: "Write the start of a text, and let the model continue it from your cursor.",
  conversation: "Ask the model something. Every turn can be edited and answered anew.",
};
const [key, views, purpose, view] = ["key", "views", "purpose", "view"].map(id => document.getElementById(id));

async function start() {
  let models;
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    if (key.hidden) view.textContent = error.message;
    return;
  }
  key.hidden = true;
  const controls = new Controls(models);
  const shown = { sheet: new Sheets(controls, START) };
  if (models.some(model => model.chat)) shown.conversation = new Conversation(controls);
  views.hidden = !shown.conversation;

  const show = name => {
    stopAll();
    controls.leave();
    controls.offer(name === "conversation");
    purpose.textContent = PURPOSE[name];
    view.replaceChildren(shown[name].root);
    shown[name].show();
  };
  views.onchange = ({ target }) => { keep(VIEW, target.value); show(target.value); };
  const first = shown[kept(VIEW)] ? kept(VIEW) : models[0].chat ? "conversation" : "sheet";
  views.querySelector(`[value=${first}]`).checked = true;
  show(first);
  shown[first].focus();
}

key.onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem("key", document.getElementById("secret").value);
  start();
};
document.addEventListener("keydown", event => { if (event.key === "Escape") stopAll(); });
start();
