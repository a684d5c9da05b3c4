// node-llama-cpp: llama.cpp in node. It leaves the closing token away where a model has no opening one; it is added here.

import { getLlama, LlamaLogLevel } from "node-llama-cpp";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { answer, asked, refuse } from "./exchange.mjs";

const request = asked();
const { folder, deploy } = request;
const known = deploy.other_tokens?.length ? JSON.parse(readFileSync(join(folder, deploy.golden), "utf-8")).token_ids : [];
const given = new Map((deploy.other_tokens ?? []).map((place) => [place, known[place]]));
const longest = deploy.max_seq_length ?? Infinity;
if (request.kind === "scores") {
  refuse("node-llama-cpp drops the blank before a query, and takes two empty texts for 0: other scores than the model's");
}

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.disabled });
const model = await llama.loadModel({ modelPath: join(folder, request.variant ?? deploy.runtime_file) });
const { tokens } = model;
const told = model.fileInfo.metadata.tokenizer.ggml;

// What the file puts before a text, and behind it. Left to itself it closes no text of a model without an opening token.
const before = told.add_bos_token !== false && tokens.bos !== null ? [tokens.bos] : [];
const ending = tokens.sep ?? tokens.eos;
const after = told.add_eos_token !== false && ending !== null ? [ending] : [];

// Its contexts hold one token less than they are asked for; no text has more tokens than bytes.
const size = Math.min(longest, Math.max(...request.texts.map((text) => Buffer.byteLength(text)))) + 16;
const settings = { contextSize: size, batchSize: size, threads: 1 };

/** A vector, of unit length where the model's are: it gives them as they come out of the pooling. */
function scaled(vector) {
  const length = deploy.normalize ? Math.hypot(...vector) : 1;
  return vector.map((number) => number / length);
}

async function embeddings() {
  const context = await model.createEmbeddingContext(settings);
  const found = { outputs: [], ids: [] };
  for (const [place, text] of request.texts.entries()) {
    const bare = model.tokenize(text, true).slice(0, longest - before.length - after.length);
    const ids = given.get(place) ?? [...before, ...bare, ...after];
    found.ids.push(ids);
    found.outputs.push(scaled((await context.getEmbeddingFor(ids)).vector));
  }
  return found;
}

const { outputs, ids } = await embeddings();
const { version } = JSON.parse(readFileSync(new URL("./node_modules/node-llama-cpp/package.json", import.meta.url)));
answer({ "node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release }, outputs, ids);
await llama.dispose();
