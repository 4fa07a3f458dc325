"""A stand-in for a notebook server: answers the hub's check, nothing else. Real ones take seconds of CPU each to start.

With ``NBGPU_TEST_PROBE`` set to a program, it runs that first and answers with what it printed at ``/probe``.
"""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

url = os.environ["JUPYTERHUB_SERVICE_URL"]
host, _, port = url.split("//")[1].split("/")[0].partition(":")
probe = os.environ.get("NBGPU_TEST_PROBE")
result = subprocess.run(probe, shell=True, capture_output=True, text=True, timeout=60).stdout if probe else ""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        text = (
            json.dumps(dict(os.environ)) if self.path.endswith("/env") else result if self.path.endswith("/probe") else '{"version": "0"}'
        )
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-JupyterHub-Version", os.environ.get("NBGPU_TEST_HUB_VERSION", "6.1.1"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


try:
    HTTPServer((host, int(port)), Handler).serve_forever()
except KeyboardInterrupt:
    sys.exit(0)
