// What the server is asked. The key is in this module's memory, and nowhere else.

let key = "";

/** Send this key from now on. */
export function useKey(text) {
  key = text.trim();
}

/** What the server refuses, in its own words; status 0: it was not reached. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The tasks: `{kind, tasks: [{name, bytes}], router}`. */
export async function tasks() {
  return (await request("tasks")).json();
}

/** All figures, as Prometheus reads them. */
export async function metrics() {
  return (await request("metrics")).text();
}

/** What a task says of an input: `{task, predictions: [{label, probabilities, value}]}`. */
export async function predict(task, input, signal) {
  const body = { ...named("task", task), inputs: [input] };
  return (await request("predict", body, signal)).json();
}

/**
 * The pieces of an answer, as they come: `{model, text, finish, usage}`.
 *
 * @param settings `{chat, maxTokens, temperature}`.
 */
export async function* generate(task, prompt, settings, signal) {
  const asked = settings.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = {
    ...named("model", task),
    ...asked,
    max_tokens: settings.maxTokens,
    temperature: settings.temperature,
    stream: true,
    stream_options: { include_usage: true },
  };
  const path = settings.chat ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, body, signal);
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError(0, event.error.message);
    const choice = event.choices[0];
    yield {
      model: event.model,
      router: event.router,
      text: choice?.text ?? choice?.delta?.content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
}

/** A request's field that names the task; none: the router picks it. */
function named(field, task) {
  return task === null ? {} : { [field]: task };
}

async function request(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const settings = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(settings, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, settings);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server can't be reached; is it running?");
  }
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** Server-sent events, parsed, up to `[DONE]`. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
