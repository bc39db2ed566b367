// A conversation with the model. Each turn can be edited and answered anew.

import { ALTERNATIVES, busy, generate, stopAll } from "./api.js";
import { copyOf, copyText, grow, make, saveText } from "./dom.js";
import { Writer, before, draw, edited, textOf } from "./pieces.js";
import { Tree, newTurn } from "./tree.js";

export class Conversation {
  constructor(controls) {
    this.root = copyOf("conversation");
    for (const name of ["fresh", "copy", "save", "colour", "system", "turns", "empty", "last", "status", "composer", "send", "stop"])
      this[name] = this.root.querySelector(`.${name}`);
    this.message = this.composer.querySelector("textarea");
    this.instructions = this.system.querySelector("textarea");
    this.controls = controls;
    this.fresh.onclick = () => this.change(Tree.putAside);
    this.last.onclick = () => this.change(Tree.bringBack);
    this.copy.onclick = () => this.copied(this.row, "Copied the conversation as a row for training.");
    this.save.onclick = () => saveText("conversation.jsonl", this.row);
    this.colour.onclick = () => this.colour.setAttribute("aria-pressed", this.turns.classList.toggle("colours"));
    this.stop.onclick = stopAll;
    this.instructions.oninput = () => { this.tree.system = this.instructions.value; grow(this.instructions); this.keep(); };
    this.message.oninput = () => { this.tree.message = this.message.value; grow(this.message); };
    onEnter(this.message, () => this.sendMessage());
    this.composer.onsubmit = event => { event.preventDefault(); this.sendMessage(); };
    addEventListener("pagehide", () => this.tree.save());  // keeps unsent messages and unfinished answers
    addEventListener("storage", event => { if (Tree.isKeptAt(event.key)) this.follow(); });
    this.load();
  }

  // Show the conversation that the browser keeps.
  load() {
    this.tree = Tree.load();
    this.warned = false;
    this.instructions.value = this.tree.system;
    this.system.open = this.tree.system !== "";
    this.message.value = this.tree.message;
    this.controls.leave();
    this.say("");
    this.draw();
  }

  // Go to another conversation. If this one can't be kept, that takes a second click.
  change(exchange) {
    if (!this.tree.save() && !this.warned) {
      this.warned = true;
      return this.say("The browser has no room to keep this conversation: save it, or press the button again to discard it.", true);
    }
    exchange();
    this.load();
    this.message.focus();
  }

  // Show the additions of another tab, unless this tab is at work.
  follow() {
    if (busy() || this.turns.querySelector(".editor")) return;
    const { value } = this.message;
    this.load();
    this.message.value = this.tree.message = value;
  }

  // Keep the conversation for the next visit.
  keep() {
    if (!this.tree.save()) this.say("The browser has no room to keep this conversation: save it before you leave.", true);
  }

  // Prepare to be shown: take the controls, which both views share.
  show() {
    this.root.append(this.controls.root);
    for (const area of this.root.querySelectorAll("textarea")) grow(area);
    this.status.scrollIntoView({ block: "nearest" });
  }

  // Put the page's cursor on the next message.
  focus() { this.message.focus(); }

  // ---- the display

  draw() {
    const { path } = this.tree;
    this.texts = new Map();  // the node with the text of each turn
    this.turns.replaceChildren(...path.slice(1).map((turn, i) => this.turn(turn, path[i], i + 2 === path.length)));
    for (const area of this.turns.querySelectorAll("textarea")) grow(area);
    this.turns.setAttribute("aria-busy", busy());
    for (const button of this.turns.querySelectorAll("button")) button.disabled ||= busy();
    this.empty.hidden = path.length > 1;
    this.last.hidden = !Tree.hasLast;
    this.fresh.disabled = busy() || path.length === 1;
    this.copy.disabled = this.save.disabled = busy() || path.length < 3;
    this.send.hidden = busy();
    this.stop.hidden = !busy();
  }

  // The node of a turn, which follows `parent`.
  turn(turn, parent, isLast) {
    const mine = turn.role === "user";
    const bar = make("div", { className: "bar" }, make("h2", { textContent: mine ? "You" : turn.model }));
    const editing = turn.draft !== undefined;
    const node = make("article", { className: `turn ${turn.role}` }, bar, editing ? this.editor(turn, parent) : this.text(turn));
    node.setAttribute("aria-label", mine ? "You" : "Answer");
    if (editing) return node;
    if (parent.next.length > 1) bar.append(this.versions(parent));
    const actions = bar.appendChild(make("div", { className: "actions" }));
    const action = (name, label, onclick) => actions.append(make("button", { type: "button", name, textContent: label, onclick }));
    if (mine && isLast) action("answer", "Answer", () => this.answer(turn));
    if (!mine && isLast && turn.open) action("continue", "Continue", () => this.write(turn));
    if (!mine) action("again", "Again", () => this.answer(parent));
    action("edit", "Edit", () => this.edit(turn));
    action("copy", "Copy", () => this.copied(textOf(turn.pieces), "Copied."));
    return node;
  }

  // The arrows between the versions of the turn after `parent`.
  versions(parent) {
    const move = (name, label, sign, step) => make("button", {
      type: "button", name, ariaLabel: label, textContent: sign,
      disabled: !parent.next[parent.chosen + step],
      onclick: () => {
        parent.chosen += step;
        this.keep();
        this.say("");
        this.draw();
        this.focusOn(parent.next[parent.chosen], name, step > 0 ? "earlier" : "later");
      },
    });
    const count = make("span", { textContent: `${parent.chosen + 1}/${parent.next.length}` });
    count.setAttribute("aria-label", `Version ${parent.chosen + 1} of ${parent.next.length}`);
    return make("div", { className: "versions" },
      move("earlier", "Earlier version", "\u2039", -1), count, move("later", "Later version", "\u203a", 1));
  }

  text(turn) {
    const node = make("div", { className: "text" });
    draw(node, turn.pieces);
    this.texts.set(turn, node);
    if (turn.role === "user") return node;
    node.tabIndex = 0;
    node.setAttribute("role", "group");
    node.setAttribute("aria-label", "Text of the answer: the arrow keys show its tokens, Enter the alternatives");
    const inspect = piece => this.controls.inspect(piece, text => this.take(turn, piece, text));
    const at = event => turn.pieces.find(piece => piece.span === event.target);
    node.addEventListener("mousemove", event => inspect(at(event)));
    node.addEventListener("click", event => {
      inspect(at(event));
      at(event)?.span.scrollIntoView({ block: "nearest" });
    });
    node.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step && event.key !== "Enter") return;
      event.preventDefault();
      if (!step) return this.controls.focus(node);
      const tokens = turn.pieces.filter(piece => piece.logprob !== undefined);
      const at = tokens.indexOf(this.controls.near);
      inspect(tokens[at < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, at + step))]);
    });
    return node;
  }

  editor(turn, parent) {
    const mine = turn.role === "user";
    const area = make("textarea", { rows: 1, value: turn.draft, ariaLabel: mine ? "Edit your turn" : "Edit the answer" });
    area.oninput = () => { turn.draft = area.value; grow(area); };
    const close = change => {
      const { draft } = turn;
      if (busy()) return;
      if (change && !draft.trim()) return this.say(mine ? "A message can't be empty." : "An answer can't be empty.", true);
      delete turn.draft;
      change?.(edited(turn.pieces, draft));
      this.draw();
      if (!busy()) this.focusOn(this.tree.path.includes(turn) ? turn : parent.next[parent.chosen], "edit");
    };
    const save = () => close(pieces => { turn.pieces = pieces; this.keep(); });
    const resume = () => close(pieces => {
      const changed = textOf(pieces) !== textOf(turn.pieces) || !mine;
      const version = changed ? { ...newTurn(turn.role, pieces), model: turn.model } : turn;
      if (changed) this.tree.add(parent, version);
      mine ? this.answer(version) : this.write(version);
    });
    const button = (label, onclick, key = "") => make("button", { type: "button", onclick }, label, key && make("kbd", { textContent: key }));
    onEnter(area, mine ? resume : save);
    area.addEventListener("keydown", event => {
      if (event.key === "Escape") close();
    });
    const buttons = mine
      ? [button("Answer anew", resume, "Enter"), button("Only save", save)]
      : [button("Save", save, "Enter"), button("Save and continue", resume)];
    buttons[0].classList.add("main");
    return make("div", { className: "editor" }, area, make("div", { className: "tools" }, ...buttons, button("Cancel", () => close(), "Esc")));
  }

  // Put the page's cursor on the first of these buttons of a turn that is enabled.
  focusOn(turn, ...names) {
    const article = this.texts.get(turn)?.parentNode;
    names.map(name => article?.querySelector(`button[name=${name}]:enabled`)).find(button => button)?.focus();
  }

  say(text, wrong = false) {
    const follow = this.status.getBoundingClientRect().top < innerHeight;  // not if somebody has scrolled up to read
    this.status.textContent = text;
    this.status.classList.toggle("error", wrong);
    if (follow) this.status.scrollIntoView({ block: "nearest" });
  }

  // ---- the person's actions

  sendMessage() {
    if (busy() || !this.message.value.trim() || !this.controls.valid()) return;
    const turn = newTurn("user", [{ text: this.message.value }]);
    this.tree.add(this.tree.path.at(-1), turn);
    this.message.value = this.tree.message = "";
    grow(this.message);
    this.message.focus();
    this.answer(turn);
  }

  edit(turn) {
    turn.draft = textOf(turn.pieces);
    this.draw();
    this.turns.children[this.tree.path.indexOf(turn) - 1].querySelector("textarea").focus({ preventScroll: true });
  }

  // Replace a token by another, and continue from there, as another version of the answer.
  take(turn, piece, text) {
    const parent = this.tree.path[this.tree.path.indexOf(turn) - 1];
    if (busy() || !parent || !turn.pieces.includes(piece)) return;
    const version = { ...newTurn("assistant", [...before(turn.pieces, piece), { text }]), model: turn.model };
    this.tree.add(parent, version);
    this.write(version);
  }

  // The conversation up to its last answer, as a row for training.
  get row() {
    const messages = this.tree.messages(this.tree.path.findLast(turn => turn.role === "assistant"));
    return `${JSON.stringify({ messages })}\n`;
  }

  copied(text, done) {
    copyText(text).then(() => this.say(done), error => this.say(error.message, true));
  }

  // ---- the model's answers

  // Add another answer to a turn.
  answer(parent) {
    if (busy() || !this.controls.valid()) return;
    const { chosen } = parent, turn = newTurn("assistant");
    this.tree.add(parent, turn);
    this.write(turn, () => this.tree.remove(parent, turn, chosen));
  }

  // Continue an answer at its end. `remove` is called if the model writes nothing, or the same as in another version.
  async write(turn, remove) {
    if (busy() || !this.controls.valid()) return;
    const { path } = this.tree, parent = path[path.indexOf(turn) - 1];
    const body = {
      messages: this.tree.messages(turn), logprobs: true, top_logprobs: ALTERNATIVES, ...this.controls.request(),
    };
    if (remove) parent.answers = (parent.answers ?? -1) + 1;
    if (body.seed !== undefined) body.seed += parent.answers ?? 0;  // so that another version is another text
    if (turn.pieces.length) body.continue_final_message = true;
    else body.messages.pop();
    turn.model = body.model;
    turn.open = true;
    this.controls.leave();
    const writer = new Writer(turn.pieces), utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    let start = 0, made = 0;
    const read = ({ delta, logprobs }) => {
      const tokens = (logprobs?.content ?? []).map(({ bytes, logprob, top_logprobs }) => {
        const token = { start, logprob, others: top_logprobs.map(({ token, logprob }) => [token, logprob]) };
        start += Array.from(utf8.decode(new Uint8Array(bytes), { stream: true })).length;
        return token;
      });
      writer.add(delta.content ?? "", tokens);
      made += tokens.length;
      return tokens.length;
    };
    const show = () => draw(this.texts.get(turn), turn.pieces);
    const writing = generate("/v1/chat/completions", body, read, show, (text, wrong) => this.say(text, wrong));
    this.draw();
    this.status.scrollIntoView({ block: "nearest" });
    if (document.activeElement === document.body) this.stop.focus();
    this.keep();
    const reason = await writing;
    turn.open = reason !== "stop";
    if (reason === "length") {
      const why = made < body.max_tokens ? "The conversation fills the model's context" : "The answer has reached the length in the settings";
      this.say(`${this.status.textContent}. ${why}.`);
    }
    const text = textOf(turn.pieces).trim(), complete = ["stop", "length"].includes(reason);
    if (remove && !text) {
      remove();
      if (complete) this.say("The model wrote no answer: ask in other words, or change the settings.", true);
    } else if (remove && complete && parent.next.some(other =>
      other !== turn && other.model === turn.model && textOf(other.pieces).trim() === text)) {
      remove();
      this.say("The model gave the same answer again: raise the temperature to get another one.", true);
    }
    const stopFocused = document.activeElement === this.stop;
    this.draw();
    if (stopFocused) this.texts.get(turn)?.focus({ preventScroll: true });
    this.keep();
  }
}

// Do something when Enter is pressed without Shift, unless an input method is composing a character.
function onEnter(area, act) {
  area.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    act();
  });
}
