"""A real S3 server on this machine (moto's), with a fault injector before it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


class Store:
    """A server and its bucket ``salt``."""

    def __init__(self, port: int) -> None:
        self.environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        """What a process needs to reach it by addresses such as ``s3://salt/shards``."""
        self.files = fs.S3FileSystem(
            access_key="test",
            secret_key="test",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{port}",
            allow_bucket_creation=True,
        )
        self.faults = 0
        """Requests that are answered with 503 from now on."""
        self.stalls = 0
        """Requests that wait ``stall_s`` for their answer, from now on."""
        self.stall_s = 4.0  # pyarrow gives a request up after 3
        self.requests: list[str] = []
        """Method and path of each."""

    def put(self, folder: Path, name: str) -> str:
        """Copies a folder or file into the bucket; its address."""
        fs.copy_files(
            str(folder),
            f"salt/{name}",
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.files,
        )
        return f"s3://salt/{name}"


def _with_faults(app: Callable, store: Store) -> Callable:
    def answer(environ: dict, start_response: Callable):
        store.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if store.faults > 0:
            store.faults -= 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [
                b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            ]
        if store.stalls > 0:
            store.stalls -= 1
            time.sleep(store.stall_s)
        return app(environ, start_response)

    return answer


@contextlib.contextmanager
def moto_store() -> Iterator[Store]:
    """The server, as long as it is needed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    held: list[Store] = []
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1", 0, lambda environ, start: _with_faults(app, held[0])(environ, start), threaded=True
    )
    held.append(Store(server.server_port))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        held[0].files.create_dir("salt")
        yield held[0]
    finally:
        server.shutdown()
        thread.join()
