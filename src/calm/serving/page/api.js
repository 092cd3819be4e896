// Requests to the server: models, streamed completions and chats.

let apiKey = "";

export function setApiKey(key) {
  apiKey = key;
}

export class KeyNeededError extends Error {}

async function send(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(apiKey && { Authorization: `Bearer ${apiKey}` }) };
  const response = await fetch(path, { headers, ...options });
  if (response.ok) return response;
  if (response.status === 401) throw new KeyNeededError("This server requires an API key: enter yours below.");
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

export async function listModels() {
  return (await (await send("v1/models")).json()).data;
}

// The events of a streamed answer, until [DONE].
export async function* stream(request, signal) {
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  const response = await send(path, { method: "POST", body: JSON.stringify({ ...request, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
