// A sheet: a text that the model continues from the cursor. Two sheets can be compared.

import { ALTERNATIVES, busy, generate, stopAll } from "./api.js";
import { Controls } from "./controls.js";
import { copyOf } from "./dom.js";
import { Writer, before, cut, draw, edited, pieceAt, textOf } from "./pieces.js";

class Sheet {
  constructor(sheets, controls, text) {
    this.root = copyOf("sheet");
    for (const name of ["go", "stop", "back", "colour", "compare", "paper", "ink", "status"])
      this[name] = this.root.querySelector(`.${name}`);
    this.area = this.root.querySelector("textarea");
    this.sheets = sheets;
    this.controls = controls;
    this.pieces = text ? [{ text }] : [];
    this.past = [];
    this.area.setAttribute("aria-label", "Text");
    this.area.addEventListener("input", () => this.typed());
    for (const kind of ["keyup", "click", "focus"]) this.area.addEventListener(kind, () => this.look());
    this.area.addEventListener("mousemove", event => this.hover(event));
    this.paper.addEventListener("mouseleave", () => this.look());
    this.area.addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); sheets.continueFrom(this); }
    });
    this.go.onclick = () => sheets.continueFrom(this);
    this.stop.onclick = stopAll;
    this.back.onclick = () => this.undo();
    this.colour.onclick = () => {
      const on = this.paper.classList.toggle("colours");
      this.colour.setAttribute("aria-pressed", on);
    };
    this.compare.onclick = () => sheets.compare();
    this.draw();
  }

  get text() { return textOf(this.pieces); }

  draw() {
    draw(this.ink, this.pieces);
    this.ink.append("\u200b");
    if (this.area.value !== this.text) this.area.value = this.text;
  }

  typed() {
    this.pieces = edited(this.pieces, this.area.value);
    this.draw();
    this.look();
  }

  // Keep the text for `undo`, and replace it by another text.
  replace(pieces) {
    this.past.push(this.pieces);
    if (this.past.length > 100) this.past.shift();
    this.pieces = pieces;
    this.draw();
  }

  undo() {
    this.pieces = this.past.pop() ?? this.pieces;
    this.back.disabled = !this.past.length;
    this.draw();
    this.say("");
  }

  hover(event) {
    const span = document.elementsFromPoint(event.clientX, event.clientY).find(node => node.matches(".ink .made"));
    this.inspect(span && this.pieces.find(piece => piece.span === span));
  }

  // Show the token at the cursor.
  look() { this.inspect(pieceAt(this.pieces, this.area.selectionStart)); }

  inspect(piece) { this.controls.inspect(piece, text => this.take(piece, text)); }

  // Replace a token by another, and continue from there.
  take(piece, text) {
    if (busy() || !this.pieces.includes(piece)) return;
    this.sheets.wait([this.write([...before(this.pieces, piece), { text }])]);
  }

  // Continue a text that begins with these pieces.
  async write(pieces) {
    this.replace([...pieces]);
    const writer = new Writer(this.pieces);
    const read = ({ text, logprobs: { tokens, token_logprobs, top_logprobs, text_offset } }) => {
      writer.add(text, tokens.map((_, i) => ({
        start: text_offset[i],
        logprob: token_logprobs[i],
        others: Object.entries(top_logprobs[i] ?? {}).sort((one, other) => other[1] - one[1]).slice(0, ALTERNATIVES),
      })));
      return tokens.length;
    };
    this.area.readOnly = true;
    const body = { prompt: this.text, logprobs: ALTERNATIVES, ...this.controls.request() };
    const reason = await generate("/v1/completions", body, read, () => this.draw(), (text, wrong) => this.say(text, wrong));
    if (reason === "stop") this.say(`${this.status.textContent}. The text ended by itself.`);
    this.area.readOnly = false;
    this.area.setSelectionRange(this.area.value.length, this.area.value.length);
  }

  // Enable the buttons that work while texts are being written, or while none is.
  allow(writing) {
    this.go.disabled = writing;
    this.stop.disabled = !writing;
    this.back.disabled = writing || !this.past.length;
  }

  say(text, wrong = false) {
    this.status.textContent = text;
    this.status.classList.toggle("error", wrong);
  }
}

// One sheet, or two to compare.
export class Sheets {
  constructor(controls, text) {
    this.root = document.createElement("div");
    this.root.className = "sheets";
    this.sheets = [new Sheet(this, controls, text)];
    this.place();
  }

  // Continue the text of one sheet from its cursor, in all sheets.
  continueFrom(sheet) {
    if (busy() || !this.sheets.every(one => one.controls.valid())) return;
    const at = sheet.area.selectionStart, { pieces } = sheet;
    const copies = () => pieces.map(piece => ({ ...piece, span: undefined }));
    this.wait(this.sheets.map(one => one.write(cut(one === sheet ? pieces : copies(), at))));
  }

  // Wait until no text is being written.
  async wait(writing) {
    for (const one of this.sheets) one.allow(true);
    await Promise.all(writing);
    for (const one of this.sheets) one.allow(false);
  }

  compare() {
    const [first, second] = this.sheets;
    if (second) {
      stopAll();
      second.root.remove();
      this.sheets.pop();
    } else {
      const sheet = new Sheet(this, new Controls(first.controls.models, first.controls), first.text);
      sheet.root.append(sheet.controls.root);
      this.sheets.push(sheet);
    }
    this.place();
  }

  place() {
    const two = this.sheets.length > 1;
    this.root.classList.toggle("two", two);
    this.sheets.forEach((sheet, i) => {
      if (!sheet.root.isConnected) this.root.append(sheet.root);
      for (const node of [sheet.root, sheet.area]) node.setAttribute("aria-label", two ? `Text ${i + 1}` : "Text");
      sheet.compare.textContent = two ? "One text" : "Compare";
      sheet.compare.setAttribute("aria-pressed", two);
    });
  }

  // Prepare to be shown: take the controls, which both views share.
  show() {
    const [{ root, controls }] = this.sheets;
    root.append(controls.root);
  }

  // Put the page's cursor at the end of the first text.
  focus() {
    const [{ area }] = this.sheets;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
