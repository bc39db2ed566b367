// Keeps texts in the browser between visits. The browser's storage may be full, or turned off.

export function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Keep a text, or remove it if it is null. Returns whether that was possible.
export function keep(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
    return true;
  } catch {
    return false;
  }
}
