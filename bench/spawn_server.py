"""The light server of `bench/spawn.py`: answers the hub at once; at ``/probe`` it takes GPU memory to its limit, and one block more.

50 real notebook servers cannot start at once on two cores, with or without nbgpu; this one starts in the time of a bare Python.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

BLOCK = 128 * 1024**2
OUT_OF_MEMORY = 2


def probe() -> dict[str, int | str]:
    """Allocate blocks until the driver says no; return what it said of the memory, what was had, and how it refused."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, pointer = ctypes.c_void_p(), ctypes.c_uint64()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def call(name: str, *arguments: object) -> int:
        return getattr(cuda, name)(*arguments)

    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), 0)),
        ("cuCtxSetCurrent", (context,)),
        ("cuMemGetInfo_v2", (ctypes.byref(free), ctypes.byref(total))),
    ):
        if status := call(name, *arguments):
            return {"error": f"{name}: {status}"}
    blocks = 0
    while (status := call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(BLOCK))) == 0:
        blocks += 1
    return {"total": total.value, "free": free.value, "had": blocks * BLOCK, "block": BLOCK, "status": status}


class Handler(BaseHTTPRequestHandler):
    """Answers the hub, and ``/probe`` with what `found` returns."""

    found: Callable[[], dict[str, Any]]

    def do_GET(self) -> None:
        body = json.dumps(type(self).found() if self.path.endswith("/probe") else {"version": "0"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-JupyterHub-Version", os.environ["NBGPU_TEST_HUB_VERSION"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def serve(found: Callable[[], dict[str, Any]]) -> None:
    """Serve where the hub said, until the end."""
    Handler.found = staticmethod(found)
    host, _, port = os.environ["JUPYTERHUB_SERVICE_URL"].split("//")[1].split("/")[0].partition(":")
    HTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    try:
        serve(probe)
    except KeyboardInterrupt:
        sys.exit(0)
