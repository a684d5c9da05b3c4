"""FAISS: the golden vectors in an index that compares all, asked for the neighbours of each."""

import faiss
import numpy
from exchange import answer, asked
from golden import golden_vectors

# By the model's similarity. Of vectors of length 1 the inner product is the cosine.
METRICS = {
    "cosine": "METRIC_INNER_PRODUCT",
    "dot": "METRIC_INNER_PRODUCT",
    "euclidean": "METRIC_L2",
    "manhattan": "METRIC_L1",
}


def scores_of(distances, similarity):
    """What FAISS calls distances, as the model's similarity: its METRIC_L2 is the square."""
    if similarity == "euclidean":
        return -numpy.sqrt(numpy.maximum(distances, 0))
    return -distances if similarity == "manhattan" else distances


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    vectors, similarity = golden_vectors(request), request["deploy"]["similarity"]
    if similarity == "cosine":
        faiss.normalize_L2(vectors)
    index = faiss.IndexFlat(vectors.shape[1], getattr(faiss, METRICS[similarity]))
    index.add(vectors)
    neighbours = []
    # One by one: for 20 queries and more it takes L2 apart into products, which moves short distances by 1e-3.
    for vector in vectors:
        distances, places = index.search(vector[None], len(vectors))
        scores = scores_of(distances[0], similarity)
        neighbours.append(list(zip(places[0].tolist(), scores.tolist())))  # noqa: B905
    answer([faiss], index.reconstruct_n(0, len(vectors)).tolist(), neighbours=neighbours)


if __name__ == "__main__":
    main()
