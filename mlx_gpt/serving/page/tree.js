// A conversation as a tree. The `next` of a turn are the versions of the turn that follows it. One version is chosen,
// and the chosen versions make up the conversation that is shown. Editing a turn or answering it anew adds a version
// beside the others, so nothing is lost.
//
// A turn is {id, role, pieces, next, chosen}. Once the model has answered it, `answers` counts the further answers, from
// 0. An answer also has the model's name and, while it is unfinished, `open`.

import { textOf } from "./pieces.js";
import { keep, kept } from "./storage.js";

const NOW = "mlx-gpt conversation", LAST = "mlx-gpt last conversation";  // keys in the browser's storage

export const newTurn = (role, pieces = []) => ({ id: Math.random().toString(36).slice(2), role, pieces, next: [], chosen: 0 });

export class Tree {
  constructor({ system = "", message = "", root = newTurn("root") } = {}) {
    this.system = system;
    this.message = message;  // not sent yet
    this.root = root;
    this.removed = new Set();  // ids of turns that another tab may have kept
  }

  // The root and the chosen turns.
  get path() {
    const path = [this.root];
    while (path.at(-1).next.length) path.push(path.at(-1).next[path.at(-1).chosen]);
    return path;
  }

  // Add another version of the turn after `parent`, and choose it.
  add(parent, turn) {
    parent.chosen = parent.next.push(turn) - 1;
  }

  // Remove a version that was added, and choose the earlier one again.
  remove(parent, turn, chosen) {
    this.removed.add(turn.id);
    parent.next.splice(parent.next.indexOf(turn), 1);
    parent.chosen = chosen;
  }

  // The conversation as messages: the chosen turns up to one of them.
  messages(until) {
    const path = this.path.slice(1);
    const turns = path.slice(0, path.indexOf(until) + 1);
    const system = this.system.trim() ? [{ role: "system", content: this.system }] : [];
    return [...system, ...turns.map(({ role, pieces }) => ({ role, content: textOf(pieces) }))];
  }

  // Keep the conversation in the browser. Returns whether its text fits; its probabilities are left out if they do not.
  // What another tab has kept since is not lost: its turns join this conversation, or another conversation is put aside.
  save() {
    const theirs = Tree.load().root;
    if (theirs.id !== this.root.id) theirs.next.length && Tree.putAside();
    else if (theirs.id) this.join(this.root, theirs);
    const pack = ({ text, logprob, others }) => logprob === undefined ? text
      : [text, round(logprob), others.map(([text, logprob]) => [text, round(logprob)])];
    const packed = pack => JSON.stringify(this, (name, value) =>
      name === "pieces" ? value.map(pack) : name === "draft" || name === "removed" ? undefined : value);
    return [pack, ({ text }) => text].some(pack => keep(NOW, packed(pack)));
  }

  // Add the turns that follow a turn in another copy of the conversation.
  join(turn, copy) {
    for (const other of copy.next) {
      const own = turn.next.find(({ id }) => id === other.id);
      if (own) this.join(own, other);
      else if (!this.removed.has(other.id)) turn.next.push(other);
    }
  }

  // Return the kept conversation, or a new one.
  static load() {
    const unpack = piece => {
      if (typeof piece === "string") return { text: piece };
      const [text, logprob, others] = piece;
      return { text, logprob, others };
    };
    try {
      return new Tree(JSON.parse(kept(NOW), (name, value) => name === "pieces" ? value.map(unpack) : value) ?? {});
    } catch {  // another program wrote this
      return new Tree();
    }
  }

  // Start a new conversation, and put this one aside until another is started.
  static putAside() {
    const now = kept(NOW);
    keep(NOW, null);  // first, because there may be no room for both
    keep(LAST, now);
  }

  static get hasLast() { return kept(LAST) !== null; }

  static bringBack() {
    const now = kept(NOW), last = kept(LAST);
    keep(LAST, null);
    keep(NOW, last);
    keep(LAST, now);
  }

  static isKeptAt(key) { return key === NOW; }
}

const round = logprob => Number(logprob.toFixed(4));
