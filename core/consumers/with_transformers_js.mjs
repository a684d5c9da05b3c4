// transformers.js: its feature-extraction pipeline, pooling and normalising as deploy.json says; logits for scores.

import { AutoModel, AutoModelForSequenceClassification, AutoTokenizer, env, pipeline } from "@huggingface/transformers";
import { answer, asked, refuse } from "./exchange.mjs";

const BATCH = 8;
const DTYPES = { "onnx/model.onnx": "fp32", "onnx/model_fp16.onnx": "fp16", "onnx/model_quantized.onnx": "q8" };
const POOLINGS = { mean: "mean", cls: "cls", lasttoken: "last_token" };

const request = asked();
const { folder, deploy } = request;
const file = request.variant ?? deploy.runtime_file;
const dtype = DTYPES[file] ?? refuse(`it looks for ${Object.keys(DTYPES).join(", ")}, not for ${file}`);
const options = { dtype, device: "cpu", local_files_only: true };
env.allowRemoteModels = false;

const tokenIds = [];

/** A tokenizer that keeps its tokens for the answer, and the closing token of long texts: the library cuts it off. */
function watched(tokenizer) {
  return (texts, given) => {
    const options = { ...given, padding: true, truncation: true };
    const found = tokenizer(texts, options);
    const { data, dims } = found.input_ids;
    const width = dims[1];
    const whole = tokenizer(texts, { ...options, padding: false, truncation: false, return_tensor: false });
    whole.input_ids.forEach((ids, row) => {
      const start = row * width;
      if (ids.length > width) {
        data[start + width - 1] = BigInt(ids.at(-1));
      }
      const seen = found.attention_mask.data.slice(start, start + width);
      tokenIds.push(Array.from(data.slice(start, start + width), Number).filter((_, place) => seen[place]));
    });
    return found;
  };
}

/** Lists of up to `size` of the rows. */
function batches(rows, size) {
  const starts = Array.from({ length: Math.ceil(rows.length / size) }, (_, place) => place * size);
  return starts.map((start) => rows.slice(start, start + size));
}

async function embeddings() {
  const outputs = [];
  if (deploy.dense.length || !(deploy.pooling in POOLINGS)) {
    // The pipeline knows nothing of these; the graph has them in it.
    const model = await AutoModel.from_pretrained(folder, options);
    const tokens = watched(await AutoTokenizer.from_pretrained(folder, options));
    for (const texts of batches(request.texts, BATCH)) {
      outputs.push(...(await model(tokens(texts))).sentence_embedding.tolist());
    }
    return outputs;
  }
  const extractor = await pipeline("feature-extraction", folder, options);
  // Of a batch it takes the last column, which is padding where the tokenizer pads at the right.
  const size = deploy.pooling === "lasttoken" ? 1 : BATCH;
  extractor.tokenizer = watched(extractor.tokenizer);
  const wanted = { pooling: POOLINGS[deploy.pooling], normalize: deploy.normalize };
  for (const texts of batches(request.texts, size)) {
    outputs.push(...(await extractor(texts, wanted)).tolist());
  }
  return outputs;
}

async function scores() {
  const model = await AutoModelForSequenceClassification.from_pretrained(folder, options);
  const tokens = watched(await AutoTokenizer.from_pretrained(folder, options));
  const outputs = [];
  for (const pairs of batches(request.inputs, BATCH)) {
    const single = !Array.isArray(pairs[0]);
    const first = single ? pairs : pairs.map((pair) => pair[0]);
    // An empty string counts as no second text; an object with one in it does not.
    const second = single ? null : pairs.map((pair) => new String(pair[1]));
    outputs.push(...(await model(tokens(first, { text_pair: second }))).logits.tolist());
  }
  return outputs;
}

const outputs = await (request.kind === "scores" ? scores() : embeddings());
answer({ "transformers.js": env.version, node: process.versions.node }, outputs, tokenIds);
