// How a script gets its request and gives its answer.

import { readFileSync, writeFileSync } from "node:fs";

/** The request in the file that is named first. */
export function asked() {
  return JSON.parse(readFileSync(process.argv[2], "utf-8"));
}

/** Write what was computed, and the versions of what did it by name, to the file named second. */
export function answer(versions, outputs, tokenIds = null) {
  writeFileSync(process.argv[3], JSON.stringify({ versions, outputs, token_ids: tokenIds }));
}

/** End, with a reason why this runtime does not compute the model. */
export function refuse(reason) {
  console.error(reason);
  process.exit(1);
}
