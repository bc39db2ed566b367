// A text as a list of pieces: {text} for a person's words, and {text, logprob, others} for each token of the model.
// `others` are the likeliest tokens in the place of this one, each as [text, logprob].

import { make } from "./dom.js";

export const textOf = pieces => pieces.map(piece => piece.text).join("");

// From 0, the rarest, to 7; each step is a factor of three in probability.
const rank = logprob => Math.max(0, Math.min(7, Math.floor(7 + logprob / Math.log(3))));

// Show the pieces in a node. Pieces that it shows already stay as they are.
export function draw(node, pieces) {
  let kept = 0;
  while (kept < pieces.length && pieces[kept].span && pieces[kept].span === node.childNodes[kept]) kept++;
  while (node.childNodes.length > kept) node.lastChild.remove();
  for (const piece of pieces.slice(kept)) {
    piece.span = make("span", { textContent: piece.text });
    if (piece.logprob !== undefined) piece.span.className = `made p${rank(piece.logprob)}`;
    node.append(piece.span);
  }
}

// The piece of a text at a position.
export function pieceAt(pieces, at) {
  let begin = 0;
  return pieces.find(piece => (begin += piece.text.length) > at);
}

// The pieces before a position.
export function cut(pieces, at) {
  const kept = [];
  let begin = 0;
  for (const piece of pieces) {
    const end = begin + piece.text.length;
    if (end <= at) kept.push(piece);
    else if (begin < at) kept.push({ text: piece.text.slice(0, at - begin) });
    begin = end;
  }
  return kept;
}

// The pieces before another piece.
export const before = (pieces, piece) => pieces.slice(0, pieces.indexOf(piece));

// The pieces of a text that a person has changed. The tokens on both sides of the change stay.
export function edited(pieces, after) {
  const text = textOf(pieces);
  let start = 0, end = 0;
  const most = Math.min(text.length, after.length);
  while (start < most && text[start] === after[start]) start++;
  while (end < most - start && text[text.length - 1 - end] === after[after.length - 1 - end]) end++;
  const stop = text.length - end, fresh = after.slice(start, after.length - end);
  const kept = [];
  let at = 0, put = false;
  const add = text => { if (text) kept.push({ text }); };
  for (const piece of pieces) {
    const last = at + piece.text.length;
    if (last <= start) kept.push(piece);
    else {
      if (at < start) add(piece.text.slice(0, start - at));
      if (!put) { add(fresh); put = true; }
      if (at >= stop) kept.push(piece);
      else if (last > stop) add(piece.text.slice(stop - at));
    }
    at = last;
  }
  if (!put) add(fresh);
  return kept;
}

// Appends the server's stream to pieces.
export class Writer {
  constructor(pieces) {
    this.pieces = pieces;
    this.shown = 0;  // in the server's characters; JavaScript counts some of them as two
  }

  // Divide a text among its tokens, each {start, logprob, others}. The first token may begin in the earlier text.
  add(text, tokens) {
    const fresh = Array.from(text);
    const first = tokens.length ? tokens[0].start : this.shown;
    const letters = [...this.takeBack(this.shown - first), ...fresh];
    this.shown += fresh.length;
    let pending;
    tokens.forEach(({ start, logprob, others }, i) => {
      const next = i + 1 < tokens.length ? tokens[i + 1].start - first : letters.length;
      const text = letters.slice(start - first, next).join("");
      pending ??= { logprob, others };
      if (text) {
        this.pieces.push({ text, ...pending });
        pending = undefined;
      }
    });
    if (!tokens.length && text) this.pieces.push({ text });
  }

  // Take the last characters off the text.
  takeBack(count) {
    let taken = [];
    while (taken.length < count) {
      const { text, logprob, others } = this.pieces.pop();
      const letters = Array.from(text);
      taken = [...letters.splice(Math.max(0, letters.length - (count - taken.length))), ...taken];
      if (letters.length) this.pieces.push({ text: letters.join(""), logprob, others });
    }
    return taken;
  }
}
