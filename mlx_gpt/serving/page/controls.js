// The controls beside a text: the token under the cursor, the settings, and the training of the model.

import { ask } from "./api.js";
import { curve } from "./curve.js";
import { copyOf, make } from "./dom.js";

// The settings: name in the API, label, initial value, lowest and highest value, step, and meaning.
const SETTINGS = [
  ["temperature", "Temperature", 0.8, 0, 2, 0.05, "Below 1 is safer, above 1 bolder. 0 always takes the likeliest token."],
  ["max_tokens", "Length", 120, 1, 1000, 1, "The highest number of tokens to write."],
  ["top_p", "Top-p", 0.95, 0, 1, 0.01, "Sample from the likeliest tokens that together have this probability. 1 turns this off."],
  ["top_k", "Top-k", 50, 0, 200, 1, "Sample from this many of the likeliest tokens. 0 turns this off."],
  ["min_p", "Min-p", 0, 0, 1, 0.01, "Leave out tokens less likely than this fraction of the likeliest token's probability. 0 turns this off."],
  ["repetition_penalty", "Repetition penalty", 1.1, 1, 2, 0.01, "Above 1, tokens that are already in the text become rarer. 1 turns this off."],
];
// Other initial values for conversations: a penalty would make the words of the question rarer in the answer, and the
// length can be high because an answer ends by itself.
const IN_CONVERSATION = { repetition_penalty: 1, max_tokens: 1000 };
let numbered = 0;

const visible = text => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
const percent = logprob => {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

export class Controls {
  constructor(models, from) {
    this.root = copyOf("controls");
    this.number = ++numbered;
    for (const name of ["token", "settings", "run"]) this[name] = this.root.querySelector(`.${name}`);
    this.token.querySelector(".close").onclick = () => this.leave();
    this.models = models;
    this.values = {};
    this.fields = {};
    this.conversing = false;
    this.kept = { ...IN_CONVERSATION };  // the values for the view that is hidden
    this.buildSettings(from);
    this.choose();
  }

  buildSettings(from) {
    const field = (name, label, input, meaning) => {
      const id = `${name}-${this.number}`;
      input.id = id;
      const small = make("small", { textContent: meaning, id: `${id}-meaning` });
      input.setAttribute("aria-describedby", small.id);
      return make("div", { className: "setting" }, make("label", { htmlFor: id, textContent: label }), input, small);
    };
    this.model = make("select");
    for (const model of this.models) this.model.append(make("option", { value: model.id, textContent: model.id }));
    this.model.value = from ? from.model.value : this.models[0].id;
    this.model.onchange = () => this.choose();
    this.facts = field("model", "Model", this.model, "");
    this.settings.append(this.facts);
    for (const [name, label, value, min, max, step, meaning] of SETTINGS) {
      const number = make("input", { type: "number", min, max, step, value: from ? from.values[name] : value });
      const row = field(name, label, number, meaning);
      const range = make("input", { type: "range", min, max, step, value: number.value });
      range.setAttribute("aria-label", label);
      const set = source => {
        if (source.value === "" || !source.checkValidity()) return;
        this.values[name] = Number(source.value);
        for (const other of [number, range]) if (other !== source) other.value = source.value;
      };
      this.fields[name] = { number, set };
      number.oninput = () => set(number);
      range.oninput = () => set(range);
      row.insertBefore(range, row.lastChild);
      this.settings.append(row);
      this.values[name] = Number(number.value);
    }
    this.seed = make("input", { type: "text", inputMode: "numeric", pattern: "[0-9]*", value: from ? from.seed.value : "" });
    this.settings.append(field("seed", "Seed", this.seed, "The same number gives the same texts in the same order. Leave it empty to get other texts each time."));
    this.ending = make("input", { type: "text", value: from ? from.ending.value : "" });
    this.settings.append(field("stop", "Stop at", this.ending, "End the text before this string, such as a full stop."));
  }

  // The settings in the API's form.
  request() {
    const body = { model: this.model.value, ...this.values };
    if (this.seed.value) body.seed = Number(this.seed.value);
    if (this.ending.value) body.stop = this.ending.value;
    return body;
  }

  // Whether all settings have allowed values. If not, the browser points at the first wrong one.
  valid() {
    const wrong = [...this.settings.querySelectorAll("input")].find(input => !input.checkValidity());
    wrong?.reportValidity();
    return !wrong;
  }

  // Offer all models, or only those that can converse. The settings in IN_CONVERSATION have a value for each view.
  offer(conversing) {
    if (conversing !== this.conversing) {
      this.conversing = conversing;
      for (const [name, value] of Object.entries(this.kept)) {
        this.kept[name] = this.values[name];
        this.fields[name].number.value = value;
        this.fields[name].set(this.fields[name].number);
      }
    }
    for (const [i, option] of [...this.model.options].entries()) option.disabled = conversing && !this.models[i].chat;
    if (!this.model.selectedOptions[0].disabled) return;
    this.model.value = this.models.find(model => model.chat).id;
    this.choose();
  }

  // Show the facts about the chosen model.
  async choose() {
    const model = this.models.find(model => model.id === this.model.value);
    const size = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toFixed(1)} million` : model.parameters;
    this.special = model.special_tokens;
    this.limitLength(Math.min(1000, model.max_tokens));
    this.facts.lastChild.textContent = `${size} parameters, a context of ${model.context.toLocaleString("en")} tokens.`;
    const answer = await ask(`/v1/models/${encodeURIComponent(model.id)}/curves`).catch(() => null);
    const curves = answer ? await answer.json() : { train: [], val: [] };
    this.run.hidden = curves.train.length + curves.val.length < 2;
    if (!this.run.hidden) this.run.querySelector(".curve").replaceChildren(curve(curves));
  }

  // Lower the highest length, and the lengths of both views.
  limitLength(most) {
    const { number, set } = this.fields.max_tokens;
    number.max = number.parentNode.querySelector("[type=range]").max = most;
    number.value = Math.min(most, this.values.max_tokens);
    set(number);
    this.kept.max_tokens = Math.min(most, this.kept.max_tokens);
  }

  // Show a token and its alternatives. `take` is called with the alternative that is clicked.
  inspect(piece, take) {
    if (piece?.logprob === undefined) piece = undefined;
    if (piece === this.near) return;
    this.near?.span.classList.remove("near");
    this.near = piece;
    if (!piece) return;  // keep showing the last token, so that the mouse can reach its alternatives
    piece.span.classList.add("near");
    this.token.hidden = false;
    this.token.querySelector(".word").textContent = `${visible(piece.text)}  ${percent(piece.logprob)}`;
    this.token.querySelector("ol").replaceChildren(...piece.others.map(([text, logprob]) => {
      const bar = make("div", { className: "bar" });
      bar.style.width = `${100 * Math.exp(logprob)}%`;
      const button = make("button", { type: "button", title: "Use this token and continue from here" },
        make("span", { className: "word", textContent: visible(text) }), make("span", { textContent: percent(logprob) }), bar);
      button.onclick = () => take(text);
      button.disabled = text.startsWith("bytes:") || this.special.includes(text);  // cannot be written as text
      return make("li", {}, button);
    }));
  }

  // Put the page's cursor on the alternatives. Escape puts it back.
  focus(back) {
    this.token.querySelector("li button:enabled")?.focus();
    this.token.onkeydown = event => { if (event.key === "Escape") back.focus(); };
  }

  // Show no token.
  leave() {
    this.inspect(undefined);
    this.token.hidden = true;
  }
}
