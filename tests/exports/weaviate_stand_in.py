"""Answers Weaviate's client in place of a server, as far as our script and page ask; it runs where the client is.

Vectors and the distance are taken from the client's own messages, and all vectors are compared. What nobody here asks
for is refused, so that a script which asks for more is seen. It shows what the client sends, not what a server does.
"""

from __future__ import annotations

import functools
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import weaviate
from weaviate.proto.v1 import base_pb2, batch_pb2, properties_pb2, search_get_pb2, weaviate_pb2_grpc

DISTANCES = {
    "cosine": lambda rows, one: 1 - rows @ one / (np.linalg.norm(rows, axis=1) * np.linalg.norm(one)),
    "dot": lambda rows, one: -(rows @ one),
    "l2-squared": lambda rows, one: ((rows - one) ** 2).sum(1),
    "manhattan": lambda rows, one: np.abs(rows - one).sum(1),
}
# Collections by name: (distance, [(properties, vector)]).
Kept = dict[str, tuple[str, list[tuple[dict[str, Any], Any]]]]


class Rest(BaseHTTPRequestHandler):
    """The schema, and what a client asks first."""

    kept: Kept

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/schema/")
        if self.path == "/v1/meta":
            self.say(200, {"version": "1.37.0"})
        elif self.path == "/v1/.well-known/ready":
            self.say(200, {})
        elif name in self.kept:
            self.say(200, {"class": name})
        else:  # no login, no such collection
            self.say(404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (settings,) = asked["vectorConfig"].values()
        distance = settings["vectorIndexConfig"]["distance"]
        own = settings["vectorizer"] == {"none": {}} and list(asked["vectorConfig"]) == ["default"]
        if self.path != "/v1/schema" or not own or settings["vectorIndexType"] != "hnsw" or distance not in DISTANCES:
            self.say(422, {"error": [{"message": f"the stand-in does not know {asked}"}]})
            return
        self.kept[asked["class"]] = (distance, [])
        self.say(200, asked)

    def do_DELETE(self) -> None:
        self.kept.pop(self.path.removeprefix("/v1/schema/"), None)
        self.say(200, {})

    def say(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is logged."""


class Grpc(weaviate_pb2_grpc.WeaviateServicer):
    """Objects come and are searched."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def BatchObjects(self, request: Any, context: Any) -> Any:
        for one in request.objects:
            vector = one.vector_bytes or one.vectors[0].vector_bytes
            properties = dict(one.properties.non_ref_properties)
            self.kept[one.collection][1].append((properties, np.frombuffer(vector, dtype="<f4")))
        return batch_pb2.BatchObjectsReply()

    def Search(self, request: Any, context: Any) -> Any:
        distance, rows = self.kept[request.collection]
        asked = request.near_vector
        query = np.frombuffer(asked.vector_bytes or asked.vectors[0].vector_bytes, dtype="<f4")
        away = DISTANCES[distance](np.stack([vector for _, vector in rows]), query)
        nearest = np.argsort(away, kind="stable")[: request.limit]
        results = [self.result(request, *rows[place], float(away[place])) for place in nearest]
        return search_get_pb2.SearchReply(results=results)

    def result(self, request: Any, properties: dict[str, Any], vector: Any, distance: float) -> Any:
        fields = {
            name: properties_pb2.Value(text_value=value)
            if isinstance(value, str)
            else properties_pb2.Value(int_value=int(value))
            for name, value in properties.items()
        }
        single = base_pb2.Vectors.VECTOR_TYPE_SINGLE_FP32
        kept = [base_pb2.Vectors(name="default", vector_bytes=vector.tobytes(), type=single)]
        asked = request.metadata
        metadata = search_get_pb2.MetadataResult(
            id=str(uuid.uuid4()),
            distance=distance,
            distance_present=asked.distance,
            vectors=kept if asked.vector or asked.vectors else [],
        )
        values = search_get_pb2.PropertiesResult(non_ref_props=properties_pb2.Properties(fields=fields))
        return search_get_pb2.SearchResult(properties=values, metadata=metadata)


@contextmanager
def standing_in() -> Iterator[Kept]:
    """`weaviate.connect_to_local` leads here for the length of a block, and asks nobody for a newer client."""
    kept: Kept = {}
    rest = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Rest,), {"kept": kept}))
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(2))
    weaviate_pb2_grpc.add_WeaviateServicer_to_server(Grpc(kept), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    real = weaviate.connect_to_local
    weaviate.connect_to_local = functools.partial(
        real, host="127.0.0.1", port=rest.server_address[1], grpc_port=port, skip_init_checks=True
    )
    try:
        yield kept
    finally:
        weaviate.connect_to_local = real
        server.stop(None)
        rest.shutdown()
        rest.server_close()
