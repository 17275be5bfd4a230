"""A Hub of one process on the loopback interface, for downloads: enough of its protocol for `model_info` and
`snapshot_download`. Repositories live in memory: {repo: {commit: {file name: bytes}}}.

Point `HF_ENDPOINT` at `HubServer.url` before anything of Hugging Face is imported, that is, in a process of its own.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")  # kept as LFS files, whose sha256 the Hub reports


class HubServer:
    """``with HubServer(repos, heads={repo: {revision: commit}}) as hub`` serves until the block ends.

    ``failures`` maps a repository to how many of its next requests are answered with 503.
    """

    def __init__(self, repos, heads):
        self.repos, self.heads, self.failures, self.requests = repos, heads, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """Environment variables for a process that is to use this Hub."""
        names = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY")
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            **dict.fromkeys(names, "1"),
        }


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for repo, left in self.hub.failures.items():
            if repo in path and left:
                self.hub.failures[repo] -= 1
                return self.answer(503, b"try again")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if api:
            return self.about(api[1], api[2], api[3] or "main")
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self.file(file[1], file[2], file[3])
        return self.answer(404, b"")

    do_HEAD = do_GET

    def files(self, repo, revision):
        """(commit, files) of a revision, or None after the error was answered."""
        if repo not in self.hub.repos:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.heads[repo].get(revision, revision)
        if commit not in self.hub.repos[repo]:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return commit, self.hub.repos[repo][commit]

    def about(self, repo, what, revision):
        if found := self.files(repo, revision):
            commit, files = found
            entries = [self.entry(name, data) for name, data in files.items()]
            siblings = [{"rfilename": e["path"], **{k: e[k] for k in ("size", "lfs") if k in e}} for e in entries]
            info = {
                "id": repo,
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            self.answer(
                200, json.dumps(entries if what == "tree" else info).encode(), {"Content-Type": "application/json"}
            )

    def entry(self, name, data):
        sha = hashlib.sha256(data).hexdigest()
        lfs = (
            {"lfs": {"sha256": sha, "oid": sha, "size": len(data), "pointerSize": 134}} if name.endswith(LARGE) else {}
        )
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(), **lfs}

    def file(self, repo, revision, name):
        if found := self.files(repo, revision):
            commit, files = found
            if name not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            entry = self.entry(name, files[name])
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(entry["size"])} if "lfs" in entry else {}
            self.answer(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"', **linked})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
