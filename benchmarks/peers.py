"""LitServe and BentoML at the job of `benchmarks/service.py transport`: eight targets out of memory, in one
body.

Not part of the project. Each runs in a virtual environment of its own: `PYTHON benchmarks/peers.py
litserve|bentoml PORT`. They look nothing up, check nothing and make no Arrow: they send a body that is there
already.
"""

import importlib.util
import os
import sys
from pathlib import Path

BODY = b"\1" * (8 * 1568 * 1024 * 2)

if importlib.util.find_spec("litserve") is not None:
    import litserve  # pyright: ignore[reportMissingImports]
    from fastapi import Response

    class LitTargets(litserve.LitAPI):
        def setup(self, device):
            pass

        def decode_request(self, request):
            return request["clips"]

        def predict(self, clips):
            return BODY

        def encode_response(self, output):
            return Response(output, media_type="application/octet-stream")


if importlib.util.find_spec("bentoml") is not None:
    import bentoml  # pyright: ignore[reportMissingImports]

    @bentoml.service
    class BentoTargets:
        @bentoml.api(route="/v1/targets")
        def targets(self, clips: int) -> bytes:
            return BODY


def serve_litserve(port: str) -> None:
    server = litserve.LitServer(LitTargets(api_path="/v1/targets"), accelerator="cpu", fast_queue=True)  # pyright: ignore
    server.run(host="127.0.0.1", port=int(port), log_level="error", generate_client_file=False)


def serve_bentoml(port: str) -> None:
    command = ["bentoml", "serve", "peers:BentoTargets", "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [sys.executable, "-m", *command, "--working-dir", str(Path(__file__).parent)])


if __name__ == "__main__":
    {"litserve": serve_litserve, "bentoml": serve_bentoml}[sys.argv[1]](sys.argv[2])
