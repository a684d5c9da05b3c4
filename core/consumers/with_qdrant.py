"""Qdrant as its client runs it without a server: the golden vectors in a collection, asked for their neighbours."""

from importlib.metadata import version

from exchange import answer, asked
from golden import golden_vectors
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

# By the model's similarity.
DISTANCES = {
    "cosine": Distance.COSINE,
    "dot": Distance.DOT,
    "euclidean": Distance.EUCLID,
    "manhattan": Distance.MANHATTAN,
}


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    vectors, similarity = golden_vectors(request), request["deploy"]["similarity"]
    client = QdrantClient(":memory:")
    size = VectorParams(size=vectors.shape[1], distance=DISTANCES[similarity])
    client.create_collection("golden", vectors_config=size)
    client.upsert("golden", [PointStruct(id=place, vector=row.tolist()) for place, row in enumerate(vectors)])
    # It gives the two distances as such, the smallest first.
    sign = -1 if similarity in ("euclidean", "manhattan") else 1
    neighbours = []
    for vector in vectors:
        found = client.query_points("golden", query=vector.tolist(), limit=len(vectors)).points
        neighbours.append([(point.id, sign * point.score) for point in found])
    stored = client.retrieve("golden", list(range(len(vectors))), with_vectors=True)
    outputs = [point.vector for point in sorted(stored, key=lambda point: point.id)]
    answer([], outputs, neighbours=neighbours, versions={"qdrant": version("qdrant-client")})


if __name__ == "__main__":
    main()
