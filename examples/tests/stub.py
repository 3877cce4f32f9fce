"""Stand-ins for tests: a web server whose answers are a function, and a generator."""

from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from collabvr import Clip


class Stub(http.server.ThreadingHTTPServer):
    """answer(method, path, body) -> (status, bytes or JSON). What was asked stands in `asked`."""

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.asked: list = []  # (method, path, headers, body)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Quiet: clients hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, self.headers, body))
        status, found = self.server.answer(self.command, self.path, body)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        kind = "video/mp4" if isinstance(found, bytes) else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *args):
        """Quiet."""


@contextmanager
def serving(answer):
    with Stub(answer) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@dataclass
class Shade:
    """All frames but the first are of one grey, which differs by seed."""

    shade: int = 120

    def __call__(self, frame, prompt, seconds, seed):
        frames = np.repeat(frame[None], round(4 * seconds) + 1, 0)
        frames[1:] = self.shade + seed
        return Clip(frames, 4)
