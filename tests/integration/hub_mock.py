"""A Hub of this machine: repositories, commits and large files over HTTP, as huggingface_hub asks for them."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What the server holds, and how it misbehaves.

    Attributes:
        repos: By name, whether it is private and its files by branch.
        storage: Large files by their hash.
        put: Hashes of the large files that were sent, in order.
        broken: Hashes of large files that are refused.
        echo: Refuse every request with an error that repeats its headers.
    """

    def __init__(self):
        self.repos, self.storage, self.put, self.broken, self.echo = {}, {}, [], set(), False
        self.tokens = set()

    def answer(self, method, path, body, headers, address):
        """Status and JSON for a request."""
        self.tokens.add(headers.get("Authorization"))
        if self.echo:
            said = f"bad credentials: {headers.get('Authorization')}"
            return 403, {"error": said, "message": said}
        parts = path.split("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            private = asked.get("private") or asked.get("visibility") == "private"
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, {"private": bool(private), "main": {}})
            return 200, {"url": f"{address}/{name}"}
        if parts == ["api", "validate-yaml"]:
            return 200, {"warnings": [], "errors": []}
        if parts[0] == "lfs":
            return self._put(parts[1], body)
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            return self._model(name, rest, body, address)
        if parts[-1] == "batch":
            return 200, self._batch(json.loads(body), address)
        return 404, {"error": f"unknown {method} {path}"}

    def _model(self, name, rest, body, address):
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}
        if rest[:1] == ["branch"]:
            repo[rest[1]] = dict(repo["main"])
            return 201, {}
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            return 200, {"files": [self._mode(file, repo[rest[1]]) for file in files]}
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[rest[1]][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repo[rest[1]][value["path"]] = self.storage[value["oid"]]
            return 200, {"commitUrl": f"{address}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}
        return 200, {"id": name, "modelId": name, "private": repo["private"], "sha": "a" * 40, "siblings": []}

    def _mode(self, file, branch):
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        data = branch.get(file["path"])
        oid = None
        if data is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            oid = hashlib.sha256(data).hexdigest() if mode == "lfs" else git
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked, address):
        def entry(item):
            known = item["oid"] in self.storage
            actions = {} if known else {"actions": {"upload": {"href": f"{address}/lfs/{item['oid']}", "header": {}}}}
            return {"oid": item["oid"], "size": item["size"], **actions}

        return {"transfer": "basic", "objects": [entry(item) for item in asked["objects"]]}

    def _put(self, digest, body):
        if digest in self.broken:
            return 403, {"error": "the connection broke"}
        assert hashlib.sha256(body).hexdigest() == digest
        self.put.append(digest)
        self.storage[digest] = body
        return 200, {}


@contextmanager
def serve():
    """A Hub and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.read_chunks()
            status, data = hub.answer(self.command, self.path, body, self.headers, address)
            said = json.dumps(data).encode()
            self.send_response(status)
            if data.get("error") == "Repository not found":
                self.send_header("X-Error-Code", "RepoNotFound")
            if hub.echo:
                self.send_header("X-Error-Message", data["error"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        def read_chunks(self):
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def log_message(self, *args):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
