"use strict";

const element = (id) => document.getElementById(id);
let models = [];
let running = null; // what Stop ends

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  if (response.status === 401) {
    element("key-row").hidden = false;
    element("key").focus();
    throw new Error("This server wants an API key: enter yours above.");
  }
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

async function loadModels() {
  models = (await (await ask("v1/models")).json()).data;
  const first = models[0];
  element("about").textContent =
    models.map((model) => `${model.id}: ${model.patch_size} token${model.patch_size === 1 ? "" : "s"} per step, ` +
      `context of ${model.context.toLocaleString()} tokens`).join("; ");
  element("temperature").value = first.temperature;
  element("length").max = Math.min(...models.map((model) => model.context));
  const calms = models.filter((model) => model.kind === "calm");
  element("sampler").value = calms[0]?.sampler ?? "batch";
  for (const option of element("sampler").options) {
    option.hidden = option.disabled = !calms.every((model) => model.samplers.includes(option.value));
  }
  element("chat-row").hidden = !models.every((model) => model.chat);
  showTemperature();
  element("panes").replaceChildren(...models.map(newPane));
}

function newPane(model) {
  const section = element("pane").content.cloneNode(true).firstElementChild;
  const text = section.querySelector(".text");
  section.querySelector("h2").textContent = model.id + (model.kind === "calm" ? "" : ` (${model.kind})`);
  text.setAttribute("aria-label", `Text of ${model.id}; arrow keys go from chunk to chunk`);
  text.addEventListener("mouseover", (event) => show(section, event.target.closest(".chunk")));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const chunks = [...text.querySelectorAll(".chunk")];
    if (!step || !chunks.length) return;
    event.preventDefault();
    const now = chunks.indexOf(text.querySelector(".current"));
    const next = chunks[Math.min(Math.max(now + step, 0), chunks.length - 1)];
    next.scrollIntoView({ block: "nearest" });
    show(section, next);
  });
  return section;
}

function show(section, chunk) {
  if (!chunk) return;
  section.querySelector(".current")?.classList.remove("current");
  chunk.classList.add("current");
  section.querySelector(".details").textContent = chunk.dataset.details;
}

// What a chunk took, in words.
function describe(model, calm, request) {
  const parts = [`${calm.tokens} token${calm.tokens === 1 ? "" : "s"} in ${calm.milliseconds.toFixed(0)} ms`];
  if (model.kind === "calm" && request.temperature < 1 && ["batch", "exact"].includes(request.sampler)) {
    const agree = Math.floor(1 / request.temperature + 0.001);
    parts.push(`${calm.drawn} candidates drawn, ${calm.decoded} of their tokens looked at`);
    parts.push(`agreement: ${agree} equal ones were asked for`);
  }
  return parts.join(" · ");
}

async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function requestOf(model) {
  const number = (id) => Number(element(id).value);
  const chat = !element("chat-row").hidden && element("chat").checked;
  const request = { model: model.id, stream: true, max_tokens: number("length"), temperature: number("temperature") };
  if (element("seed").value !== "") request.seed = number("seed");
  if (model.kind === "calm") {
    request.sampler = element("sampler").value;
    request.num_candidates = number("candidates");
  }
  if (chat) request.messages = [{ role: "user", content: element("prompt").value }];
  else request.prompt = element("prompt").value;
  return request;
}

async function generate(model, section, signal) {
  const text = section.querySelector(".text");
  const numbers = section.querySelector(".numbers");
  const request = requestOf(model);
  const prompt = document.createElement("i");
  prompt.className = "prompt";
  prompt.textContent = request.prompt ?? "";
  text.replaceChildren(prompt);
  numbers.textContent = "waiting";
  section.querySelector(".details").textContent = "";
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  let steps = 0, tokens = 0, seconds = 0;
  const summary = () => {
    const saved = tokens - steps;
    const against = saved > 0 ? `, ${saved} saved against token by token` : "";
    return `${tokens} tokens in ${steps} steps${against}; ${seconds ? (tokens / seconds).toFixed(0) : "–"} tokens/s`;
  };
  try {
    const response = await ask(path, { method: "POST", body: JSON.stringify(request), signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      steps += 1;
      tokens += event.calm.tokens;
      seconds += event.calm.milliseconds / 1000;
      const chunk = document.createElement("span");
      chunk.className = "chunk";
      chunk.textContent = choice.text ?? choice.delta.content;
      chunk.dataset.details = describe(model, event.calm, request);
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      text.append(chunk);
      if (atEnd) text.scrollTop = text.scrollHeight;
      numbers.textContent = summary();
    }
  } catch (error) {
    numbers.textContent = steps ? `${summary()} (stopped)` : "";
    if (error.name !== "AbortError") throw error;
  }
}

function showTemperature() {
  element("temperature-shown").value = Number(element("temperature").value).toFixed(2);
}

async function run(event) {
  event?.preventDefault();
  if (running || !element("form").reportValidity()) return;
  element("error").textContent = "";
  const controller = (running = new AbortController());
  element("generate").disabled = true;
  element("stop").disabled = false;
  try {
    if (!models.length) await loadModels();
    const sections = [...element("panes").children];
    const results = await Promise.allSettled(
      models.map((model, index) => generate(model, sections[index], controller.signal)),
    );
    const failed = results.find((result) => result.status === "rejected");
    if (failed) throw failed.reason;
  } catch (error) {
    element("error").textContent = error instanceof TypeError ? "the server cannot be reached" : error.message;
  } finally {
    running = null;
    element("generate").disabled = false;
    element("stop").disabled = true;
  }
}

element("form").addEventListener("submit", run);
element("stop").addEventListener("click", () => running?.abort());
element("temperature").addEventListener("input", showTemperature);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
});
loadModels().catch((error) => (element("error").textContent = error.message));
