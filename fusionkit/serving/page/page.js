// The page: what is served, two tasks side by side on one input, and live figures.

import { Answer } from "./answers.js";
import { metrics, tasks, useKey } from "./api.js";
import { at, make, size } from "./elements.js";
import { Figures, show } from "./figures.js";

const EVERY = 2000;
const ROWS = 50;
const AUTO = "\u0000auto";
const sides = ["left", "right"].map((side) => ({ answer: new Answer(at(side)), task: at(`${side}-task`) }));
const figures = new Figures();
let served = null;
let requests = new Map();
let asking = null;

/** Ask the server what there is, and show it. */
async function begin() {
  try {
    take(await tasks());
    at("key-form").hidden = true;
    at("key-error").textContent = "";
    await look();
  } catch (error) {
    if (error.status !== 401) {
      tell(error.message);
      setTimeout(begin, EVERY);
      return;
    }
    const again = !at("key-form").hidden;
    at("key-form").hidden = false;
    tell("a key is needed");
    at("key-error").textContent = again ? "the server does not know this key" : "";
    at("key").focus();
  }
}

/** Say how the server is; what is said already is not read out again. */
function tell(text) {
  if (at("state").textContent !== text) at("state").textContent = text;
}

/** Show the tasks; those that were chosen stay so. */
function take(list) {
  const before = served;
  served = list;
  const generation = list.kind === "generation";
  const bytes = list.tasks.reduce((sum, task) => sum + task.bytes, 0);
  const names = list.tasks.map((task) => task.name);
  const kind = generation ? "text generation" : "classification";
  tell(`${names.length} tasks · ${size(bytes)} over one base · ${kind}`);
  if (before && names.join("\n") === before.tasks.map((task) => task.name).join("\n")) return;
  sides.forEach(({ task }, place) => {
    const chosen = task.value;
    const options = names.map((name) => new Option(name, name));
    if (list.router) options.unshift(new Option("the router picks", AUTO));
    task.replaceChildren(...options);
    task.selectedIndex = Math.min(place, options.length - 1);
    if (options.some((option) => option.value === chosen)) task.value = chosen;
  });
  for (const each of document.querySelectorAll(".generation")) each.hidden = !generation;
  for (const each of document.querySelectorAll(".classification")) each.hidden = generation;
  at("text-label").textContent = generation ? "Prompt" : "Text";
  for (const id of ["try", "live", "all"]) at(id).hidden = false;
  at("filter-field").hidden = names.length <= 12;
  chooseKind();
  listTasks();
}

/** The table of tasks. */
function listTasks() {
  const wanted = at("filter").value.toLowerCase();
  const found = served.tasks.filter((task) => task.name.toLowerCase().includes(wanted));
  at("rows").replaceChildren(
    ...found.slice(0, ROWS).map(({ name, bytes }) =>
      make("tr", "", make("td", "", name), make("td", "", size(bytes)), make("td", "", `${requests.get(name) ?? 0}`)),
    ),
  );
  const more = found.length - ROWS;
  at("more").textContent = more > 0 ? `… and ${more} more: say what their names have` : found.length ? "" : "none";
}

/** Look at the figures, again and again while the page is seen. */
async function look() {
  if (!document.hidden) {
    try {
      const taken = figures.take(await metrics(), performance.now());
      requests = taken.requests;
      show(at("figures"), taken.shown);
      take(await tasks());
      listTasks();
    } catch (error) {
      tell(error.message);
      if (error.status === 401) return begin();
    }
  }
  setTimeout(look, EVERY);
}

function kind() {
  return served.kind === "generation" ? "text" : document.querySelector("[name=kind]:checked").value;
}

function chooseKind() {
  for (const field of document.querySelectorAll("[data-kinds]")) {
    field.hidden = !field.dataset.kinds.split(" ").includes(kind());
  }
  at("text").required = kind() !== "image";
  at("image").required = kind() === "image";
}

/** The input, as the server takes it. */
async function input() {
  if (kind() === "pair") return { text: at("text").value, pair: at("second").value };
  if (kind() === "text") return at("text").value;
  const bytes = new Uint8Array(await at("image").files[0].arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 8192) {
    text += String.fromCharCode(...bytes.subarray(start, start + 8192));
  }
  return { image: btoa(text) };
}

async function ask() {
  asking?.abort();
  const own = (asking = new AbortController());
  at("stop").disabled = false;
  const asked = {
    kind: served.kind,
    input: await input(),
    settings: {
      chat: at("chat").checked,
      maxTokens: at("max-tokens").valueAsNumber,
      temperature: at("temperature").valueAsNumber,
    },
  };
  const named = (task) => (task.value === AUTO ? null : task.value);
  await Promise.all(sides.map(({ answer, task }) => answer.show(named(task), asked, own.signal)));
  if (asking === own) at("stop").disabled = true;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("stop").addEventListener("click", () => asking?.abort());
at("kinds").addEventListener("change", chooseKind);
at("filter").addEventListener("input", listTasks);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  at("key").value = "";
  begin();
});
begin();
