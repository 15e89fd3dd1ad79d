"""A small Hub on loopback: the part of the real protocol that the unmodified `huggingface_hub` client speaks.

    with HubServer() as hub:
        hub.endpoint                       # for HF_ENDPOINT
        hub.repos["me/model"].files()      # {path: content} of main; of a Space: hub.repos["spaces/me/space"]
        hub.faults.append(Fault("503", at=4))

Files go up base64 in the commit ("regular"), or by LFS, with `lfs_suffixes`. A
commit becomes visible in one step, and only if everything it names has arrived. Faults strike a request by its number
or by its path: an answer 503, a connection cut before, in the middle of or behind the work, a slow answer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

import uvicorn
from hub_schema import metadata_errors
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route


def _fine_grained(permission: str) -> dict:
    return {"role": "fineGrained", "scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": [permission]}]}


USERS = {
    "hf_writer": {"role": "write"},
    "hf_reader": {"role": "read"},
    "hf_fine": _fine_grained("repo.write"),
    "hf_coarse": _fine_grained("repo.content.read"),
}
"""Tokens of the one account, `me`, which belongs to the organizations `team` (to write) and `club` (to read)."""


SPACES = "spaces/"


class _Kind(Convertor):
    """Which kind of repository a path is about."""

    regex = "models|spaces"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("kind", _Kind())


@dataclass
class Fault:
    """What goes wrong, and where: at request number `at` (from 0), or at requests whose method and path match `path`.

    `kind`: "503"; "cut" before the work, "cut body" in the middle of the upload, "cut answer" behind the work; "slow".
    """

    kind: str
    at: int | None = None
    path: str | None = None
    times: int = 1

    def strikes(self, number: int, line: str) -> bool:
        here = number == self.at if self.at is not None else re.search(self.path, line) is not None
        if here and self.times > 0:
            self.times -= 1
            return True
        return False


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def compared(self) -> str:
        """What the client compares with its own file."""
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    tree: dict[str, Blob]
    title: str
    parent: str | None = None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    shown: list[tuple[str, frozenset[str] | None]] = field(default_factory=list)
    """Every state any branch or tag was ever in: its name, and the files one saw there; `None` once it is deleted."""

    def point(self, refs: dict[str, str], name: str, oid: str) -> None:
        refs[name] = oid
        self.shown.append((name, frozenset(self.files(oid))))

    def drop(self, refs: dict[str, str], name: str) -> bool:
        if name not in refs:
            return False
        del refs[name]
        self.shown.append((name, None))
        return True

    def add(self, branch: str, commit: Commit) -> str:
        content = repr(
            (sorted((p, b.oid) for p, b in commit.tree.items()), commit.title, commit.parent, len(self.commits))
        )
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = commit
        self.point(self.branches, branch, oid)  # the one step in which it becomes visible
        return oid

    def find(self, revision: str) -> str | None:
        named = self.branches | self.tags | {oid: oid for oid in self.commits}
        return named.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        tree = self.commits[self.find(revision)].tree
        return {path: blob.content for path, blob in tree.items() if path != ".gitattributes"}

    def titles(self, revision: str = "main") -> list[str]:
        oid, titles = self.find(revision), []
        while oid is not None:
            titles.append(self.commits[oid].title)
            oid = self.commits[oid].parent
        return titles[:-1]  # the first one comes with the repository


def answer_error(status: int, code: str, message: str) -> Response:
    headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
    return JSONResponse({"error": message}, status, headers)


class HubServer:
    def __init__(self, lfs_suffixes: tuple[str, ...] = ()) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}  # as the client reads them, by slug
        self.lfs_suffixes = lfs_suffixes
        self.store: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.counter = itertools.count()
        self.delay = 1.0

    # -- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> HubServer:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else Nagle stays on
        listening.bind(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self, log_level="critical", proxy_headers=False, lifespan="off", ws="none", http="h11")
        self.server = uvicorn.Server(config)
        self.app = Starlette(routes=self._routes())
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def reset(self) -> None:
        """As new, but for what was uploaded."""
        self.repos.clear()
        self.collections.clear()
        self.faults.clear()
        self.log.clear()
        self.counter = itertools.count()

    def seed(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> Repo:
        """A repository that holds something, as if somebody had put it there."""
        repo = self.repos.setdefault(repo_id, Repo())
        if not repo.branches:
            repo.add("main", Commit({".gitattributes": Blob(b"", False)}, "initial commit"))
        tree = repo.commits[repo.branches.get(branch, repo.branches["main"])].tree
        tree = tree | {path: Blob(content, False) for path, content in files.items()}
        repo.add(branch, Commit(tree, "by hand", repo.branches.get(branch, repo.branches["main"])))
        return repo

    # -- faults ---------------------------------------------------------------------------------------------------

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return
        number, line = next(self.counter), f"{scope['method']} {scope['path']}"
        self.log.append(line)
        fault = next((fault for fault in self.faults if fault.strikes(number, line)), None)
        kind = None if fault is None else fault.kind
        transport = send.__self__.transport  # of uvicorn's request cycle: the only way to really cut a connection
        if kind == "503":
            await Response("<html>Service Unavailable</html>", 503, media_type="text/html")(scope, receive, send)
        elif kind == "cut":
            transport.abort()
        elif kind == "cut body":
            await receive()
            transport.abort()
        elif kind == "cut answer":
            await self.app(scope, receive, _swallow)
            transport.abort()
        else:
            if kind == "slow":
                await asyncio.sleep(self.delay)
            await self.app(scope, receive, send)

    # -- routes ---------------------------------------------------------------------------------------------------

    def _routes(self) -> list[Route]:
        model = "/api/{kind:kind}/{owner}/{name}"
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/collections", self.create_collection, methods=["POST"]),
            Route("/api/collections/{slug:path}/items", self.add_to_collection, methods=["POST"]),
            Route("/api/collections/{slug:path}", self.show_collection),
            Route(model, self.with_repo(self.info)),
            Route(model + "/revision/{revision:path}", self.with_repo(self.info)),
            Route(model + "/auth-check/write", self.with_repo(self.info, write=True)),
            Route(model + "/refs", self.with_repo(self.refs)),
            Route(model + "/commits/{revision:path}", self.with_repo(self.commits)),
            Route(model + "/tree/{place:path}", self.with_repo(self.tree)),
            Route(model + "/preupload/{revision:path}", self.with_repo(self.preupload, write=True), methods=["POST"]),
            Route(model + "/commit/{revision:path}", self.with_repo(self.commit, write=True), methods=["POST"]),
            Route(
                model + "/branch/{branch:path}", self.with_repo(self.branch, write=True), methods=["POST", "DELETE"]
            ),
            Route(model + "/tag/{target:path}", self.with_repo(self.tag, write=True), methods=["POST", "DELETE"]),
            Route("/{owner}/{name}/resolve/{place:path}", self.with_repo(self.resolve), methods=["GET", "HEAD"]),
            Route(
                "/{owner}/{name}.git/info/lfs/objects/batch", self.with_repo(self.lfs_batch, True), methods=["POST"]
            ),
            Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
            Route("/lfs/{oid}/verify", self.lfs_verify, methods=["POST"]),
            Route("/cdn/{oid}", self.cdn, methods=["GET", "HEAD"]),
        ]

    def with_repo(self, handler: Callable[[Request, Repo], Awaitable[Response]], write: bool = False) -> Callable:
        """A handler that gets the repository its path names, if the token may see it, and write to it if it wants."""

        async def handle(request: Request) -> Response:
            token = _token(request)
            repo_id = _repo_id(request)
            repo = self.repos.get(repo_id)
            if repo is None or (repo.private and token not in USERS):
                return answer_error(404 if token in USERS else 401, "RepoNotFound", "Repository not found")
            if repo.gated:
                return answer_error(403, "GatedRepo", "Access to this model is restricted")
            if write and token not in USERS:
                return answer_error(401, "", "Invalid username or password.")
            if write and not _may_write(token, repo_id):
                return answer_error(403, "", "You don't have the rights to write to this repository")
            return await handler(request, repo)

        return handle

    # -- account and repositories ---------------------------------------------------------------------------------

    async def whoami(self, request: Request) -> Response:
        token = _token(request)
        if token not in USERS:
            return answer_error(401, "", "Invalid username or password.")
        user = USERS[token]
        access: dict = {"displayName": "test", "role": user["role"]}
        if user["role"] == "fineGrained":
            access["fineGrained"] = {"global": [], "scoped": user["scoped"]}
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
        return JSONResponse(
            {"type": "user", "name": "me", "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}
        )

    async def create(self, request: Request) -> Response:
        body = await request.json()
        token = _token(request)
        repo_id = f"{body.get('organization') or 'me'}/{body['name']}"
        if token not in USERS:
            return answer_error(401, "", "Invalid username or password.")
        if not _may_write(token, repo_id):
            return answer_error(403, "", f"You don't have the rights to create a model under {repo_id.split('/')[0]}")
        if body.get("type") == "space":
            if body.get("sdk") not in ("gradio", "docker", "static"):
                return answer_error(400, "", "sdk is required for a Space")
            repo_id = SPACES + repo_id
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
        repo = Repo(private=body.get("visibility") == "private" or body.get("private") is True)
        repo.add("main", Commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit"))
        self.repos[repo_id] = repo
        return JSONResponse({"url": url, "name": repo_id, "id": "1"})

    async def validate_yaml(self, request: Request) -> Response:
        errors = metadata_errors((await request.json())["content"])
        status = 400 if errors else 200
        return JSONResponse({"errors": [{"message": error} for error in errors], "warnings": []}, status)

    async def create_collection(self, request: Request) -> Response:
        body = await request.json()
        slug = f"{body['namespace']}/{body['title'].lower()}-{len(self.collections):024x}"
        if (there := [one["slug"] for one in self.collections.values() if one["title"] == body["title"]]) != []:
            return JSONResponse({"error": "Collection already exists", "slug": there[0]}, 409)
        if not _may_write(_token(request), body["namespace"] + "/"):
            return answer_error(403, "", f"You don't have the rights to create a collection in {body['namespace']}")
        self.collections[slug] = {
            "slug": slug, "title": body["title"], "description": body["description"], "private": body["private"],
            "owner": {"name": body["namespace"]}, "items": [], "lastUpdated": "2026-11-29T00:00:00.000Z",
            "position": 0, "theme": "blue", "upvotes": 0,
        }  # fmt: skip
        return JSONResponse(self.collections[slug])

    async def show_collection(self, request: Request) -> Response:
        return JSONResponse(self.collections[request.path_params["slug"]])

    async def add_to_collection(self, request: Request) -> Response:
        collection, item = self.collections[request.path_params["slug"]], (await request.json())["item"]
        if item["id"] not in self.repos:
            return answer_error(404, "RepoNotFound", "Repository not found")
        if any(item["id"] == one["id"] for one in collection["items"]):
            return answer_error(409, "", "Item already in collection")
        new = item | {"_id": f"{len(collection['items']):024x}", "position": len(collection["items"])}
        collection["items"].append(new)
        return JSONResponse(collection)

    async def info(self, request: Request, repo: Repo) -> Response:
        oid = repo.find(request.path_params.get("revision", "main"))
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        repo_id = _repo_id(request)
        siblings = [{"rfilename": path} for path in repo.commits[oid].tree]
        content = {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repo.private,
            "siblings": siblings,
        }
        return JSONResponse(content | {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    async def refs(self, request: Request, repo: Repo) -> Response:
        def listed(refs: dict[str, str], kind: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        content = {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}
        return JSONResponse(content)

    async def commits(self, request: Request, repo: Repo) -> Response:
        oid, history = repo.find(request.path_params["revision"]), []
        while oid is not None:
            commit = repo.commits[oid]
            time = "2026-11-29T00:00:00.000Z"
            history.append({"id": oid, "title": commit.title, "message": "", "authors": [], "date": time})
            oid = commit.parent
        return JSONResponse(history)

    def _split(self, repo: Repo, place: str) -> tuple[str | None, str]:
        """The commit and the path of `revision/path`; a revision may have slashes."""
        place = unquote(place)
        parts = place.split("/")
        for count in range(1, len(parts) + 1):
            if (oid := repo.find("/".join(parts[:count]))) is not None:
                return oid, "/".join(parts[count:])
        return None, place

    async def tree(self, request: Request, repo: Repo) -> Response:
        oid, path = self._split(repo, request.path_params["place"])
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        entries = [_entry(name, blob) for name, blob in repo.commits[oid].tree.items() if name.startswith(path)]
        if path and not entries:
            return answer_error(404, "EntryNotFound", f"{path} does not exist")
        return JSONResponse(entries)

    # -- writing --------------------------------------------------------------------------------------------------

    async def preupload(self, request: Request, repo: Repo) -> Response:
        oid = repo.find(request.path_params["revision"])
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        tree, files = repo.commits[oid].tree, []
        for file in (await request.json())["files"]:
            mode = "lfs" if file["path"].endswith(self.lfs_suffixes or ("\0",)) else "regular"
            there = tree.get(file["path"])
            known = {"oid": there.compared} if there is not None else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return JSONResponse({"files": files})

    async def commit(self, request: Request, repo: Repo) -> Response:
        branch = request.path_params["revision"]
        if branch not in repo.branches:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        parent = repo.branches[branch]
        tree, title = dict(repo.commits[parent].tree), ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    return answer_error(412, "", "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.store:
                    return answer_error(400, "", f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = Blob(self.store[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.add(branch, Commit(tree, title, parent))
        repo_id = _repo_id(request)
        return JSONResponse(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}
        )

    async def branch(self, request: Request, repo: Repo) -> Response:
        name = request.path_params["branch"]
        if request.method == "DELETE":
            if not repo.drop(repo.branches, name):
                return answer_error(404, "RevisionNotFound", "Reference does not exist")
            return Response(status_code=204)
        if name in repo.branches:
            return answer_error(409, "", "Reference already exists")
        oid = repo.find((await request.json()).get("startingPoint", "main"))
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        repo.point(repo.branches, name, oid)
        return JSONResponse({})

    async def tag(self, request: Request, repo: Repo) -> Response:
        target = request.path_params["target"]
        if request.method == "DELETE":
            if not repo.drop(repo.tags, target):
                return answer_error(404, "RevisionNotFound", "Reference does not exist")
            return Response(status_code=204)
        name, oid = (await request.json())["tag"], repo.find(target)
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        if name in repo.tags:
            return answer_error(409, "", "Tag reference exists already")
        repo.point(repo.tags, name, oid)
        return JSONResponse({})

    # -- LFS ------------------------------------------------------------------------------------------------------

    async def lfs_batch(self, request: Request, repo: Repo) -> Response:
        objects = []
        for wanted in (await request.json())["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.store:
                upload: dict = {"href": f"{self.endpoint}/lfs/{oid}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs/{oid}/verify"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def lfs_put(self, request: Request) -> Response:
        oid, content = request.path_params["oid"], await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return answer_error(400, "", "the content is not what was announced")
        self.store[oid] = content
        return Response()

    async def lfs_verify(self, request: Request) -> Response:
        return Response(status_code=200 if request.path_params["oid"] in self.store else 404)

    # -- reading --------------------------------------------------------------------------------------------------

    async def resolve(self, request: Request, repo: Repo) -> Response:
        oid, path = self._split(repo, request.path_params["place"])
        if oid is None:
            return answer_error(404, "RevisionNotFound", "Invalid rev id")
        blob = repo.commits[oid].tree.get(path)
        if blob is None:
            answer = answer_error(404, "EntryNotFound", f"{path} does not exist")
            answer.headers["X-Repo-Commit"] = oid
            return answer
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            return RedirectResponse(f"{self.endpoint}/cdn/{blob.sha256}", 302, headers=headers)
        return _ranged(request, blob.content, headers)

    async def cdn(self, request: Request) -> Response:
        oid = request.path_params["oid"]
        return _ranged(request, self.store[oid], {"ETag": f'"{oid}"'})


def _repo_id(request: Request) -> str:
    """The name a repository is kept under: a Space may be called what a model is called."""
    path = request.path_params
    return f"{SPACES * (path.get('kind') == 'spaces')}{path['owner']}/{path['name']}"


async def _swallow(message: dict) -> None:
    """An answer that never arrives."""


def _token(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else None


def _may_write(token: str | None, repo_id: str) -> bool:
    user = USERS.get(token, {"role": "none"})
    granted = user["role"] == "write" or any("repo.write" in scope["permissions"] for scope in user.get("scoped", ()))
    return granted and repo_id.removeprefix(SPACES).split("/")[0] in ("me", "team")


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
    return entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {})


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    headers = headers | {"Accept-Ranges": "bytes"}
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Response(content[start : end + 1], 206, headers, "application/octet-stream")
    return Response(content, 200, headers, "application/octet-stream")
