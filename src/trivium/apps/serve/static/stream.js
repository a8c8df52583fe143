// Asking the API for an answer and reading it as it comes.

/**
 * Stream the answer to a conversation; resolves with why it ended.
 * @param {{model: string, messages: {role: string, content: string}[], temperature: number, maxTokens: number|null,
 *   signal: AbortSignal, onText: (text: string) => void}} request
 * @returns {Promise<{reason: string, tokens: number}>}
 */
export async function ask({ model, messages, temperature, maxTokens, signal, onText }) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, temperature, ...(maxTokens ? { max_tokens: maxTokens } : {}), stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok || !response.body) throw new Error(await explain(response));
  let reason = "";
  let tokens = 0;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason) reason = choice.finish_reason;
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
  }
  return { reason, tokens };
}

/** @param {Response} response @returns {Promise<string>} */
async function explain(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/**
 * Yield the data of each server-sent event of a body.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split("\n\n");
      rest = parts.pop() ?? "";
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
