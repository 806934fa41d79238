// What a task answers: classes as bars, numbers, texts that grow.

import { generate, predict } from "./api.js";
import { make, time } from "./elements.js";

const SHOWN = 8;

/** One side of the comparison. */
export class Answer {
  constructor(article) {
    this.name = article.querySelector("h3");
    this.body = article.querySelector(".answer");
    this.error = article.querySelector(".error");
  }

  /**
   * Ask a task, and show what it says.
   *
   * @param task its name; null: the router picks it.
   * @param asked `{kind, input, settings}`.
   */
  async show(task, asked, signal) {
    this.name.textContent = task ?? "…";
    this.error.textContent = "";
    this.body.replaceChildren();
    this.body.setAttribute("aria-busy", "true");
    const started = performance.now();
    try {
      const text = asked.kind === "generation";
      const told = text ? await this.#text(task, asked, signal) : await this.#classes(task, asked, signal);
      const took = time((performance.now() - started) / 1000);
      this.body.append(make("p", "note", [...told, took].join(" · ")));
    } catch (error) {
      this.error.textContent = error.name === "AbortError" ? "stopped" : error.message;
    } finally {
      this.body.setAttribute("aria-busy", "false");
    }
  }

  async #classes(task, asked, signal) {
    const found = await predict(task, asked.input, signal);
    this.name.textContent = found.task;
    const { probabilities, value } = found.predictions[0];
    if (value !== null) {
      this.body.append(make("p", "value", value.toPrecision(4)));
    } else {
      const sorted = Object.entries(probabilities).sort((one, other) => other[1] - one[1]);
      this.body.append(bars(sorted.slice(0, SHOWN)));
      const rest = sorted.slice(SHOWN);
      if (rest.length) {
        const summary = make("summary", "", `${rest.length} more`);
        this.body.append(make("details", "", summary, bars(rest)));
      }
    }
    return picked(found.router);
  }

  async #text(task, asked, signal) {
    const grown = document.createTextNode("");
    const prompt = asked.settings.chat ? "" : make("span", "prompt", asked.input);
    this.body.append(make("pre", "", prompt, grown));
    let [finish, usage, router] = ["", null, null];
    for await (const piece of generate(task, asked.input, asked.settings, signal)) {
      this.name.textContent = piece.model;
      grown.data += piece.text;
      finish = piece.finish ?? finish;
      usage = piece.usage ?? usage;
      router = piece.router ?? router;
    }
    const told = picked(router);
    if (usage) told.push(`${usage.completion_tokens} tokens`);
    if (finish === "length") told.push("as long as it may be");
    return told;
  }
}

function picked(router) {
  return router ? [`picked by the router, ${percent(router.probability)} sure`] : [];
}

function bars(entries) {
  const list = make("ol", "bars");
  for (const [label, probability] of entries) {
    const bar = make("span", "bar");
    bar.style.width = percent(probability);
    const item = make("li", "", bar, make("span", "", label), make("span", "share", percent(probability)));
    list.append(item);
  }
  return list;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}
