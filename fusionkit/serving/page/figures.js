// Live figures, out of what Prometheus reads.

import { make, size, time } from "./elements.js";

const OWN = new Set(["/metrics", "/tasks", "/health", "/ready", "/", "/page/{name}", "other"]);

/** Prometheus' text: `[{name, labels, value}]`. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, label, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
    }
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

/** What is shown of figures, and of how they changed: `[name, text]`, and requests by task. */
export class Figures {
  #before = null;

  take(text, now) {
    const samples = parse(text).filter(({ labels }) => !OWN.has(labels.endpoint));
    const sum = (name, labels = {}) => total(samples, `fusionkit_${name}`, labels);
    const counts = { now, requests: sum("requests_total"), tokens: sum("tokens_total", { kind: "completion" }) };
    const before = this.#before;
    this.#before = counts;
    const rate = (name) => (before ? ((counts[name] - before[name]) / (now - before.now)) * 1000 : null);
    const mean = (name) => sum(`${name}_sum`) / sum(`${name}_count`);
    const shown = [
      ["Requests", counts.requests.toLocaleString("en")],
      ["Requests / s", fixed(rate("requests"))],
      ["Half within", within(samples, 0.5)],
      ["99% within", within(samples, 0.99)],
      ["Rows waiting", fixed(sum("rows_waiting"), 0)],
      ["Rows a step", fixed(mean("rows_per_step"))],
      ["Tasks a step", fixed(mean("tasks_per_step"))],
      ["Tokens / s", counts.tokens ? fixed(rate("tokens")) : null],
      ["Tasks ready", fixed(sum("operand_tasks"), 0)],
      ["Memory of tasks", Number.isFinite(sum("operand_bytes")) ? size(sum("operand_bytes")) : null],
    ];
    return { shown: shown.filter(([, value]) => value !== null), requests: byTask(samples) };
  }
}

/** Put figures into a list of terms. */
export function show(list, shown) {
  list.replaceChildren(
    ...shown.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))),
  );
}

function total(samples, name, labels) {
  const found = samples.filter(
    (each) => each.name === name && Object.entries(labels).every(([key, value]) => each.labels[key] === value),
  );
  return found.length || name.endsWith("_total") ? found.reduce((sum, each) => sum + each.value, 0) : NaN;
}

function byTask(samples) {
  const found = new Map();
  for (const { name, labels, value } of samples) {
    if (name === "fusionkit_requests_total" && labels.task) {
      found.set(labels.task, (found.get(labels.task) ?? 0) + value);
    }
  }
  return found;
}

/** The time within which a share of all requests was answered, between the histogram's bounds. */
function within(samples, share) {
  const bounds = new Map();
  for (const { name, labels, value } of samples) {
    if (name === "fusionkit_request_seconds_bucket") {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      bounds.set(bound, (bounds.get(bound) ?? 0) + value);
    }
  }
  const sorted = [...bounds].sort((one, other) => one[0] - other[0]);
  const wanted = share * (sorted.at(-1)?.[1] ?? 0);
  if (!wanted) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of sorted) {
    if (count >= wanted) {
      if (bound === Infinity) return `over ${time(low)}`;
      return time(low + ((bound - low) * (wanted - below)) / (count - below));
    }
    [low, below] = [bound, count];
  }
  return null;
}

function fixed(value, digits = 1) {
  return value === null || !Number.isFinite(value) ? null : value.toFixed(digits);
}
