// One model's text of a turn: patches as they arrive, numbers, details of the patch under the pointer.

import { stream } from "./api.js";

function show(section, patch) {
  if (!patch) return;
  section.querySelector(".current")?.classList.remove("current");
  patch.classList.add("current");
  section.querySelector(".details").textContent = patch.dataset.details;
}

// The cost of a patch, in words.
function describe(model, cost, request) {
  const parts = [`${cost.tokens} token${cost.tokens === 1 ? "" : "s"} in ${cost.milliseconds.toFixed(0)} ms`];
  if (model.kind === "calm" && request.temperature < 1 && ["batch", "exact"].includes(request.sampler)) {
    const agree = Math.floor(1 / request.temperature + 0.001);
    parts.push(`${cost.drawn} candidates sampled, ${cost.decoded} of their tokens decoded`);
    parts.push(`agreement: ${agree} equal candidates required`);
  }
  return parts.join(" · ");
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

export class Pane {
  constructor(model) {
    this.model = model;
    this.section = document.getElementById("pane").content.cloneNode(true).firstElementChild;
    this.text = this.section.querySelector(".text");
    this.section.querySelector("h2").textContent = model.id + (model.kind === "calm" ? "" : ` (${model.kind})`);
    this.text.setAttribute("aria-label", `Text of ${model.id}; arrow keys move from patch to patch`);
    this.text.addEventListener("mouseover", (event) => show(this.section, event.target.closest(".patch")));
    this.text.addEventListener("keydown", (event) => this.move(event));
    const button = this.section.querySelector(".copy");
    button.setAttribute("aria-label", `Copy the text of ${model.id}`);
    button.addEventListener("click", () => copy(button, this.prompt + this.answer));
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const patches = [...this.text.querySelectorAll(".patch")];
    if (!step || !patches.length) return;
    event.preventDefault();
    const now = patches.indexOf(this.text.querySelector(".current"));
    const next = patches[Math.min(Math.max(now + step, 0), patches.length - 1)];
    next.scrollIntoView({ block: "nearest" });
    show(this.section, next);
  }

  // Write the model's text as it arrives; onTokens(seconds, tokens) follows its speed.
  async generate(request, signal, onTokens) {
    const numbers = this.section.querySelector(".numbers");
    this.prompt = request.prompt ?? "";
    this.answer = "";
    const prompt = document.createElement("i");
    prompt.className = "prompt";
    prompt.textContent = this.prompt;
    this.text.replaceChildren(prompt);
    numbers.textContent = "waiting";
    let steps = 0, tokens = 0, seconds = 0, ended = false;
    const count = (number, unit) => `${number} ${unit}${number === 1 ? "" : "s"}`;
    const summary = () => {
      const saved = tokens - steps;
      const against = saved > 0 ? ` (${saved} fewer than a token model)` : "";
      const speed = `${seconds ? (tokens / seconds).toFixed(0) : "–"} tokens/s`;
      return `${count(tokens, "token")} in ${count(steps, "step")}${against}; ${speed}${ended ? "; end of text" : ""}`;
    };
    try {
      for await (const event of stream(request, signal)) {
        const choice = event.choices[0];
        ended ||= choice?.finish_reason === "stop";
        if (ended) numbers.textContent = summary();
        if (!event.calm || !choice) continue;
        steps += 1;
        tokens += event.calm.tokens;
        seconds += event.calm.milliseconds / 1000;
        onTokens(seconds, tokens);
        this.append(choice.text ?? choice.delta.content ?? "", describe(this.model, event.calm, request));
        numbers.textContent = summary();
      }
    } catch (error) {
      numbers.textContent = steps ? `${summary()} (stopped)` : "";
      if (error.name !== "AbortError") throw error;
    }
  }

  append(text, details) {
    const patch = document.createElement("span");
    patch.className = "patch";
    patch.textContent = text;
    patch.dataset.details = details;
    this.answer += text;
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(patch);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}
