// Put one message to a model behind an OpenAI-compatible service and print its JSON answer.
//
//   node ask.mjs http://127.0.0.1:5273/v1 support-desk "I lost my card" [--stream] [--system TEXT]
//
// Needs Node.js 20 or later and nothing else. A key, where the service wants one, comes from OPENAI_API_KEY.
import { parseArgs } from "node:util";

class Trouble extends Error {}

async function post(url, body) {
  const headers = { "content-type": "application/json", authorization: `Bearer ${process.env.OPENAI_API_KEY || "none-needed"}` };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(60_000) };
  const response = await fetch(`${url.replace(/\/$/, "")}/chat/completions`, options).catch((error) => {
    throw new Trouble(`Nothing answers at ${url} (${error.cause?.code ?? error.message}): start the service, or check the address.`);
  });
  if (response.ok) return response;
  const words = (await response.text()).slice(0, 200);
  throw new Trouble(`The service refused the request with HTTP status ${response.status} (${words}): check that it has the model ${body.model}.`);
}

// Server-sent events: lines "data: {…}", the last one "data: [DONE]". A line may come in several chunks.
async function* pieces(response) {
  let rest = "";
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "[DONE]";
      if (data !== "[DONE]") yield JSON.parse(data).choices[0]?.delta.content ?? "";
    }
  }
}

async function ask(url, body) {
  const response = await post(url, body);
  if (!body.stream) return (await response.json()).choices[0].message.content ?? "";
  let reply = "";
  for await (const piece of pieces(response)) {
    process.stdout.write(piece);
    reply += piece;
  }
  process.stdout.write("\n");
  return reply;
}

async function main() {
  const options = { stream: { type: "boolean", default: false }, system: { type: "string", default: "Answer with JSON." } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 3) throw new Trouble('Usage: node ask.mjs BASE_URL MODEL "MESSAGE" [--stream] [--system TEXT]');
  const [url, model, message] = positionals;
  const messages = [{ role: "system", content: values.system }, { role: "user", content: message }];
  const reply = await ask(url, { model, messages, temperature: 0, max_tokens: 256, stream: values.stream });
  try {
    JSON.parse(reply);
  } catch (error) {
    throw new Trouble(`The reply is not JSON (${error.message}): check that this model was trained for the task.`);
  }
  if (!values.stream) console.log(reply);
}

main().catch((error) => {
  console.error(error instanceof Trouble ? error.message : `The service's answer cannot be read (${error.message}): check that it is OpenAI-compatible.`);
  process.exitCode = 1;
});
