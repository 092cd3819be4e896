// The page: prompt, settings, and a transcript of turns. A turn is one prompt and the text of every model.

import { KeyNeededError, listModels, setApiKey } from "./api.js";
import { SpeedChart } from "./chart.js";
import { Pane } from "./pane.js";

const element = (id) => document.getElementById(id);
const EXAMPLES = ["Once upon a time", "The capital of France is", "def read_lines(path):\n"];
const STYLES = { Precise: 0, Balanced: 0.5, Free: 1 };
const WITH_PROBABILITIES = ["direct", "mtp", "token_prediction"]; // these samplers accept temperature 0
const SAMPLER_NAMES = { mtp: "multi-token prediction", token_prediction: "multi-token prediction" };
let models = [];
let turns = []; // { prompt, chat, panes, article }
let running = null; // the controller that Stop aborts

async function loadModels() {
  models = await listModels();
  const calms = models.filter((model) => model.kind === "calm");
  element("about").textContent = models
    .map((model) => `${model.id}: ${model.patch_size} token${model.patch_size === 1 ? "" : "s"} per step, ` +
      `context of ${model.context.toLocaleString()} tokens`).join("; ");
  element("length").max = Math.min(...models.map((model) => model.context));
  const names = (calms[0]?.samplers ?? []).filter((name) => calms.every((model) => model.samplers.includes(name)));
  element("sampler").replaceChildren(...names.map((name) => new Option(SAMPLER_NAMES[name] ?? name, name)));
  if (names.includes(calms[0]?.sampler)) element("sampler").value = calms[0].sampler;
  for (const id of ["sampler", "candidates"]) element(id).closest("label").hidden = !calms.length;
  element("mode").hidden = !models.every((model) => model.chat);
  setTemperature(models[0].temperature);
}

const isChat = () => !element("mode").hidden && element("form").elements.mode.value === "chat";

function lowestTemperature() {
  const known = !models.some((model) => model.kind === "calm") || WITH_PROBABILITIES.includes(element("sampler").value);
  return known ? 0 : 0.3;
}

function setTemperature(value) {
  element("temperature").value = Math.max(value, lowestTemperature());
  showTemperature();
}

function showTemperature() {
  const temperature = Number(element("temperature").value);
  element("temperature-shown").value = temperature === 0 ? "0 (greedy)" : temperature.toFixed(2);
  for (const button of element("presets").querySelectorAll("button")) {
    const chosen = Math.max(STYLES[button.textContent], lowestTemperature());
    button.setAttribute("aria-pressed", String(Math.abs(chosen - temperature) < 0.01));
  }
}

function requestOf(model, turn) {
  const number = (id) => Number(element(id).value);
  const request = { model: model.id, max_tokens: number("length"), temperature: number("temperature") };
  if (element("seed").value !== "") request.seed = number("seed");
  if (model.kind === "calm") {
    request.sampler = element("sampler").value;
    request.num_candidates = number("candidates");
  }
  if (turn.chat) request.messages = history(model, turn);
  else request.prompt = turn.prompt;
  return request;
}

// The messages before and with a turn, as this model has answered them.
function history(model, turn) {
  const index = models.indexOf(model);
  const messages = [];
  for (const earlier of turns.slice(0, turns.indexOf(turn)).filter((other) => other.chat)) {
    messages.push({ role: "user", content: earlier.prompt });
    messages.push({ role: "assistant", content: earlier.panes[index].answer });
  }
  return [...messages, { role: "user", content: turn.prompt }];
}

function addTurn(prompt) {
  const article = element("turn").content.cloneNode(true).firstElementChild;
  const turn = { prompt, chat: isChat(), panes: models.map((model) => new Pane(model)), article };
  article.querySelector(".asked").textContent = prompt || "(a new document)";
  article.querySelector(".asked").setAttribute("aria-label", turn.chat ? "Message sent" : "Prompt sent");
  article.querySelector(".panes").replaceChildren(...turn.panes.map((pane) => pane.section));
  article.querySelector(".again").addEventListener("click", () => generate(turn));
  article.querySelector(".edit").addEventListener("click", () => edit(turn));
  turns.push(turn);
  element("transcript").append(article);
  return turn;
}

// Put the prompt of a turn back into the form. The turn and those after it, which depend on it, are removed.
function edit(turn) {
  running?.abort();
  element("prompt").value = turn.prompt;
  removeFrom(turns.indexOf(turn));
  element("prompt").focus();
}

function removeFrom(index) {
  for (const turn of turns.splice(index)) turn.article.remove();
  element("clear").hidden = turns.length === 0;
}

async function generate(turn) {
  if (running || !element("form").reportValidity()) return;
  element("error").textContent = "";
  const controller = (running = new AbortController());
  setRunning(true);
  try {
    if (!models.length) await loadModels();
    turn ??= addTurn(element("prompt").value);
    if (turn.chat) {
      removeFrom(turns.indexOf(turn) + 1); // later messages answered the text that is replaced now
      element("prompt").value = "";
    }
    element("clear").hidden = false;
    const chart = new SpeedChart(turn.article.querySelector(".speed"), models.map((model) => model.id));
    turn.article.scrollIntoView({ block: "nearest" });
    const results = await Promise.allSettled(turn.panes.map((pane, index) => pane.generate(
      requestOf(models[index], turn), controller.signal, (seconds, tokens) => chart.add(index, seconds, tokens),
    )));
    const failed = results.find((result) => result.status === "rejected");
    if (failed) throw failed.reason;
  } catch (error) {
    report(error);
  } finally {
    running = null;
    setRunning(false);
  }
}

function report(error) {
  element("error").textContent = error instanceof TypeError ? "the server cannot be reached" : error.message;
  if (!(error instanceof KeyNeededError)) return;
  element("key-row").hidden = false;
  element("key").focus();
}

function setRunning(isRunning) {
  element("stop").disabled = !isRunning;
  for (const button of document.querySelectorAll("#generate, #clear, .again")) button.disabled = isRunning;
}

function button(text, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", onClick);
  return made;
}

element("examples").append("Try: ", ...EXAMPLES.map((text) => button(text.trim(), () => {
  element("prompt").value = text;
  element("prompt").focus();
})));
element("presets").append(...Object.keys(STYLES).map((name) => button(name, () => setTemperature(STYLES[name]))));
element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
element("key").addEventListener("input", () => setApiKey(element("key").value));
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => removeFrom(0));
element("temperature").addEventListener("input", showTemperature);
element("sampler").addEventListener("change", () => setTemperature(Number(element("temperature").value)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
loadModels().catch(report);
