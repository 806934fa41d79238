// Elements are made with text, never with markup: what the server's data says stays text.

/** An element with a class and children: elements, or texts. */
export function make(tag, name = "", ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

export const at = (id) => document.getElementById(id);

/** Bytes in the unit that reads best. */
export function size(bytes) {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 1000) return `${unit === "B" ? bytes : bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(2)} GB`;
}

/** Seconds in the unit that reads best. */
export function time(seconds) {
  if (seconds < 1) return `${Math.max(1, Math.round(1000 * seconds))} ms`;
  return `${seconds.toFixed(1)} s`;
}
