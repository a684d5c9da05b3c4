"""What reads a saved model elsewhere, one script a runtime: run by `burnish verify` in that runtime's own environment.

A script imports nothing of Burnish and nothing that its runtime does not bring. One in JavaScript (.mjs) is copied,
with the other such files here, to a folder whose node_modules leads to the packages. A script is called with two paths:
of a JSON file with the request, and of one to write the answer to.

Request: "folder", "kind" ("embeddings" or "scores"), "inputs" (texts or pairs, as they were asked), "prompts" (the name
of each text's prompt, or null), "texts" (the inputs with their prompts before them), "deploy" (the folder's
`deploy.json`) and "variant" (a file of the folder, or null).

Answer: "versions" (of what computed it), "outputs" (a vector or logits for each input) and "token_ids" (for each input;
null where the runtime does not tell). A store of vectors, which gives back the golden ones as outputs, has "neighbours"
besides: for each input [place, similarity] of all inputs as the store finds them, nearest first, the similarity being
the model's (a distance is negative).
"""
