// Small helpers for the page's elements.

export const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

// A copy of one of the page's templates.
export const copyOf = id => document.getElementById(id).content.cloneNode(true).firstElementChild;

// Make a text area as high as its text.
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// Copy a text. Browsers offer their clipboard only to pages from this machine or with TLS, and may ask the person
// first. The old way, which follows it, has neither limit.
export async function copyText(text) {
  try {
    return await navigator.clipboard.writeText(text);
  } catch {}
  const area = make("textarea", { value: text }), focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused.focus();
  if (!copied) throw new Error("The browser does not allow this page to copy.");
}

export function saveText(name, text) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text])) });
  link.click();
  URL.revokeObjectURL(link.href);
}
