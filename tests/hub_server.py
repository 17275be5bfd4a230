"""A Hub of one process on the loopback interface, for downloads and uploads: enough of its protocol for `model_info`,
`snapshot_download`, `push_to_hub` and `upload_folder`. Repositories live in memory: {repo: {commit: {file: bytes}}}.

Point `HF_ENDPOINT` at `HubServer.url` before anything of Hugging Face is imported, that is, in a process of its own.
Who wants to write or to see a private repository shows the token `TOKEN`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")  # kept as LFS files, whose sha256 the Hub reports
TOKEN = "hf_loopback"
OWNER = "org"  # whom the token belongs to


class HubServer:
    """``with HubServer(repos, heads={repo: {revision: commit}}) as hub`` serves until the block ends.

    ``failures`` maps a repository to how many of its next requests are answered with 503; ``private`` are repositories
    that only the owner of the token sees; ``commits`` are the messages of what was uploaded, by repository.
    """

    def __init__(self, repos=None, heads=None):
        self.repos, self.heads = repos or {}, heads or {}
        self.failures, self.requests, self.private, self.objects, self.commits = {}, [], set(), {}, {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=None):
        """Environment variables for a process that is to use this Hub."""
        names = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY")
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            **dict.fromkeys(names, "1"),
            **({"HF_TOKEN": token} if token else {}),
        }

    def files(self, repo, revision="main"):
        """{file name: bytes} of a revision."""
        return self.repos[repo][self.heads[repo][revision]]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def route(self):
        """Call what answers this method and path, after what goes wrong for all of them."""
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        for repo, left in self.hub.failures.items():
            if repo in path and left:
                self.hub.failures[repo] -= 1
                return self.answer(503, b"try again")
        for method, pattern, function in ROUTES:
            if (found := re.fullmatch(pattern, path)) and self.command in method.split():
                return function(self, *found.groups())
        return self.answer(404, b"")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refused(self):
        """Whether the request was answered because it needs the token and has none, or a wrong one."""
        if not self.is_owner():
            self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        return not self.is_owner()

    def found(self, repo, revision):
        """(commit, files) of a revision, or None after the error was answered."""
        if repo not in self.hub.repos or (repo in self.hub.private and not self.is_owner()):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.heads[repo].get(revision, revision)
        if commit not in self.hub.repos[repo]:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return commit, self.hub.repos[repo][commit]

    # Reading

    def about(self, repo, what, revision):
        if found := self.found(repo, revision or "main"):
            commit, files = found
            entries = [self.entry(name, data) for name, data in files.items()]
            siblings = [{"rfilename": e["path"], **{k: e[k] for k in ("size", "lfs") if k in e}} for e in entries]
            info = {
                "id": repo,
                "sha": commit,
                "siblings": siblings,
                "private": repo in self.hub.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            self.answer_json(entries if what == "tree" else info)

    def entry(self, name, data):
        sha = hashlib.sha256(data).hexdigest()
        lfs = (
            {"lfs": {"sha256": sha, "oid": sha, "size": len(data), "pointerSize": 134}} if name.endswith(LARGE) else {}
        )
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's name of the file
        return {"type": "file", "path": name, "size": len(data), "oid": blob, **lfs}

    def file(self, repo, revision, name):
        if found := self.found(repo, revision):
            commit, files = found
            if name not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            entry = self.entry(name, files[name])
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(entry["size"])} if "lfs" in entry else {}
            self.answer(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"', **linked})

    # Writing

    def who_am_i(self):
        if not self.refused():
            self.answer_json({"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        if self.refused():
            return
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            return self.answer_json(url, 409)
        first = hashlib.sha1(repo.encode()).hexdigest()
        self.hub.repos[repo], self.hub.heads[repo], self.hub.commits[repo] = {first: {}}, {"main": first}, []
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self.answer_json(url)

    def branch(self, repo, name):
        if not self.refused() and (found := self.found(repo, "main")):
            created = name not in self.hub.heads[repo]
            self.hub.heads[repo].setdefault(name, found[0])
            self.answer_json({}, 201 if created else 409)

    def preupload(self, repo, revision):
        """How each file is to come, and the name of what is there already, so that it need not come again."""
        if not self.refused() and (found := self.found(repo, revision)):
            answers = []
            for file in json.loads(self.body)["files"]:
                name, there = file["path"], found[1].get(file["path"])
                entry = self.entry(name, there) if there is not None else {}
                oid = entry.get("lfs", {}).get("sha256") or entry.get("oid")
                mode = "lfs" if name.endswith(LARGE) else "regular"
                answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer_json({"files": answers})

    def lfs_batch(self, repo):
        if not self.refused():
            objects = json.loads(self.body)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.objects:
                    links = {"upload": "upload", "verify": "verify"}
                    each["actions"] = {k: {"href": f"{self.hub.url}/lfs/{v}/{each['oid']}"} for k, v in links.items()}
            self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        """As behind a signed address: no token comes along, the hash must fit."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, b"the sha256 of the body is another")
        self.hub.objects[oid] = self.body
        self.answer(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, oid):
        data = self.hub.objects.get(oid)
        fits = data is not None and len(data) == json.loads(self.body)["size"]
        self.answer_json({}, 200 if fits else 404)

    def commit(self, repo, revision):
        if self.refused() or not (found := self.found(repo, revision)):
            return
        parent, files = found[0], dict(found[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    return self.answer_json({"error": "the branch has moved"}, 412)
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(parent.encode() + self.body).hexdigest()
        self.hub.repos[repo][commit], self.hub.heads[repo][revision] = files, commit
        self.hub.commits.setdefault(repo, []).append(message)
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def validate(self):
        self.answer_json({"errors": [], "warnings": []})

    def answer_json(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.who_am_i),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(.+)", Handler.commit),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/upload/(.+)", Handler.lfs_upload),
    ("POST", "/lfs/verify/(.+)", Handler.lfs_verify),
    ("GET HEAD", f"/api/models/{REPO}(?:/(revision|tree)/([^/]+))?", Handler.about),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.file),
]
