// Small helpers for what the browser shows.

export const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

// A copy of one of the page's templates.
export const copyOf = id => document.getElementById(id).content.cloneNode(true).firstElementChild;

// Let a text area be as high as its text.
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
