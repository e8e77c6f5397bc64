// A GGUF model under llama.cpp, asked over standard input and output: node worker.mjs MODEL.gguf THREADS
//
// Lines of JSON both ways, as slmops_course/runtimes/worker.py has them. The prompt's template and the tokenizer are those
// in the GGUF file, so nothing else of the model is needed. Its folder holds node_modules with node-llama-cpp.
import { createInterface } from "node:readline";
import { Template } from "@huggingface/jinja";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const [file, threads] = process.argv.slice(2);
const say = (value) => process.stdout.write(JSON.stringify(value) + "\n");
const since = (start) => (performance.now() - start) / 1000;

const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: file, useMmap: true });
const contextSize = Math.min(model.trainContextSize, 2048);
const context = await model.createContext({ contextSize, threads: Number(threads), sequences: 1 });
const sequence = context.getSequence();
const template = new Template(model.fileInfo.metadata.tokenizer.chat_template);
say({ ready: true });

async function answer({ messages, max_new_tokens: limit }) {
  const start = performance.now();
  const prompt = model.tokenize(template.render({ messages, add_generation_prompt: true }), true);
  if (prompt.length + limit > contextSize) throw new Error(`the prompt has ${prompt.length} tokens, and ${contextSize} fit`);
  await sequence.clearHistory(); // every message pays for its whole prompt, as in the other runtimes
  const output = [];
  let firstS = null;
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    firstS ??= since(start);
    output.push(token);
    if (model.isEogToken(token) || output.length === limit) break;
  }
  const text = model.detokenize(output.filter((token) => !model.isEogToken(token)));
  const latencyS = since(start);
  return { text, prompt_ids: prompt, output_ids: output, first_s: firstS ?? latencyS, latency_s: latencyS };
}

for await (const line of createInterface({ input: process.stdin })) {
  say(await answer(JSON.parse(line)).catch((error) => ({ error: error.message })));
}
process.exit(0); // llama.cpp's threads would keep the process
