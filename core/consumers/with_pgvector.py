"""pgvector in a PostgreSQL of its own: the golden vectors in a table, asked for the neighbours of each."""

import sys

import psycopg
from exchange import answer, asked
from golden import golden_vectors
from pgvector.psycopg import register_vector
from postgres import server

# By the model's similarity: the operator, and the class that an index has to have for it.
OPERATORS = {
    "cosine": ("<=>", "vector_cosine_ops"),
    "dot": ("<#>", "vector_ip_ops"),
    "euclidean": ("<->", "vector_l2_ops"),
    "manhattan": ("<+>", "vector_l1_ops"),
}
# Dimensions that an index takes, by the type of its column.
WIDEST = {"vector": 2000, "halfvec": 4000}


def neighbours_of(connection, vectors, operator, similarity):
    """[(place, score)] of each vector, nearest first. `<#>` gives the inner product with the other sign."""
    query = f"SELECT place, embedding {operator} %s FROM golden ORDER BY embedding {operator} %s LIMIT {len(vectors)}"
    found = []
    for vector in vectors:
        rows = connection.execute(query, (vector, vector)).fetchall()
        found.append([(place, 1 - distance if similarity == "cosine" else -distance) for place, distance in rows])
    return found


def check_index(connection, vectors, operator, kind, column):
    """PostgreSQL says nothing when an index is of another operator: it reads the whole table then."""
    width = vectors.shape[1]
    embedding = "embedding" if column == "vector" else f"embedding::{column}({width})"
    connection.execute(f"CREATE INDEX ON golden USING hnsw (({embedding}) {kind})")
    connection.execute("SET enable_seqscan = off")
    connection.execute(f"SET hnsw.ef_search = {len(vectors)}")
    query = f"SELECT place FROM golden ORDER BY {embedding} {operator} %s::{column}({width}) LIMIT {len(vectors)}"
    plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {query}", (vectors[0],)))
    if "Index Scan" not in plan:
        sys.exit(f"PostgreSQL makes no use of an index with {kind} for {operator}")
    for vector in vectors:
        found = {place for (place,) in connection.execute(query, (vector,))}
        if len(found) < len(vectors):
            sys.exit(f"the index with {kind} finds {len(found)} of {len(vectors)} vectors")


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    vectors, similarity = golden_vectors(request), request["deploy"]["similarity"]
    operator, kind = OPERATORS[similarity]
    with (
        server() as place,
        psycopg.connect(host=place, user="postgres", dbname="postgres", autocommit=True) as connection,
    ):
        connection.execute("CREATE EXTENSION vector")
        register_vector(connection)
        connection.execute(f"CREATE TABLE golden (place int PRIMARY KEY, embedding vector({vectors.shape[1]}))")
        for row, vector in enumerate(vectors):
            connection.execute("INSERT INTO golden VALUES (%s, %s)", (row, vector))
        neighbours = neighbours_of(connection, vectors, operator, similarity)
        stored = connection.execute("SELECT embedding FROM golden ORDER BY place").fetchall()
        outputs = [row.to_numpy().tolist() for (row,) in stored]
        for column, widest in WIDEST.items():
            if vectors.shape[1] <= widest:
                check_index(connection, vectors, operator, kind.replace("vector", column), column)
        (extension,) = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        (postgres,) = connection.execute("SHOW server_version").fetchone()
    answer([psycopg], outputs, neighbours=neighbours, versions={"pgvector": extension, "postgresql": postgres})


if __name__ == "__main__":
    main()
