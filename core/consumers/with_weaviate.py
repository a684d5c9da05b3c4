"""Weaviate, of which a server has to run on this machine: the golden vectors in a collection of its own, gone after."""

import sys
import uuid

import weaviate
from exchange import answer, asked
from golden import golden_vectors
from weaviate.classes.config import Configure, DataType, Property, VectorDistances
from weaviate.classes.data import DataObject
from weaviate.classes.query import MetadataQuery
from weaviate.exceptions import WeaviateConnectionError

# By the model's similarity.
DISTANCES = {
    "cosine": VectorDistances.COSINE,
    "dot": VectorDistances.DOT,
    "euclidean": VectorDistances.L2_SQUARED,
    "manhattan": VectorDistances.MANHATTAN,
}


def score_of(distance, similarity):
    """What Weaviate calls a distance, as the model's similarity: that of `dot` is its product with the other sign."""
    if similarity == "cosine":
        return 1 - distance
    return -(max(distance, 0) ** 0.5) if similarity == "euclidean" else -distance


def searched(collection, vectors, similarity):
    """(vectors as they are kept, [(place, score)] of each, nearest first)."""
    kept, neighbours = {}, []
    for vector in vectors:
        found = collection.query.near_vector(
            near_vector=vector.tolist(),
            limit=len(vectors),
            include_vector=True,
            return_metadata=MetadataQuery(distance=True),
        ).objects
        kept.update((one.properties["place"], one.vector["default"]) for one in found)
        places = [(one.properties["place"], score_of(one.metadata.distance, similarity)) for one in found]
        neighbours.append(places)
    return [kept[place] for place in range(len(vectors))], neighbours


def connected():
    """The client of the server here."""
    try:
        return weaviate.connect_to_local()
    except WeaviateConnectionError:
        sys.exit("no server of Weaviate answers on this machine, ports 8080 and 50051; start one")


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    vectors, similarity = golden_vectors(request), request["deploy"]["similarity"]
    index = Configure.VectorIndex.hnsw(distance_metric=DISTANCES[similarity])
    name = f"BurnishVerify{uuid.uuid4().hex}"
    with connected() as client:
        version = client.get_meta()["version"]
        try:
            collection = client.collections.create(
                name,
                properties=[Property(name="place", data_type=DataType.INT)],
                vector_config=Configure.Vectors.self_provided(vector_index_config=index),
            )
            rows = [DataObject(properties={"place": place}, vector=row.tolist()) for place, row in enumerate(vectors)]
            collection.data.insert_many(rows)
            outputs, neighbours = searched(collection, vectors, similarity)
        finally:
            client.collections.delete(name)
    versions = {"server": version, "weaviate": weaviate.__version__}
    answer([], outputs, neighbours=neighbours, versions=versions)


if __name__ == "__main__":
    main()
