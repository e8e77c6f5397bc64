"""A stand-in for Azure's management service and blob storage on loopback, for the real client to talk to.

It keeps what it is sent and answers in the service's form. It does not run anything. A script says how it misbehaves:
steps are played one a request to the path they are meant for.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

SCOPE = "/subscriptions/sub/resourceGroups/group/providers/Microsoft.MachineLearningServices/workspaces/desk"
WORKSPACE = {
    "id": SCOPE, "name": "desk", "location": "westeurope", "type": "Microsoft.MachineLearningServices/workspaces",
    "properties": {
        "workspaceId": "0f0f", "discoveryUrl": "https://westeurope.api.azureml.ms/discovery", "friendlyName": "desk",
        "storageAccount": "/subscriptions/sub/resourceGroups/group/providers/Microsoft.Storage/storageAccounts/desk",
    },
}  # fmt: skip
COMPUTE = {
    "computeType": "AmlCompute", "provisioningState": "Succeeded",
    "properties": {"vmSize": "STANDARD_D4S_V3", "vmPriority": "Dedicated", "osType": "Linux",
                   "scaleSettings": {"minNodeCount": 0, "maxNodeCount": 4, "nodeIdleTimeBeforeScaleDown": "PT120S"}},
}  # fmt: skip


class StandIn(ThreadingHTTPServer):
    """Listens on a free loopback port from entering a block to leaving it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, object]] = []  # method, path below the workspace, body
        self.tokens: list[str | None] = []
        self.resources: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.script: list[tuple[str, str, object]] = []  # method, path's beginning, what to do
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def sent(self, method: str, beginning: str) -> list:
        """The bodies of the requests of a kind."""
        return [body for verb, path, body in self.requests if verb == method and path.startswith(beginning)]

    def next_step(self, method: str, path: str):
        for number, (verb, beginning, _) in enumerate(self.script):
            if verb == method and path.startswith(beginning):
                return self.script.pop(number)[2]
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = parts.path.removeprefix(SCOPE).lstrip("/")
        if parts.path.startswith("/blob/"):
            return self.blob(parts, body)
        content = json.loads(body) if body else None
        self.server.requests.append((self.command, path, content))
        self.server.tokens.append(self.headers.get("Authorization"))
        step = self.server.next_step(self.command, path)
        if step == "cut":
            self.close_connection = True
            return None
        if step == "cut after":  # it is taken, but nobody hears of it
            self.answer(path, content)
            self.close_connection = True
            return None
        if step is not None:
            words = {"error": {"code": f"Code{step}", "message": "as the script says"}}
            return self.reply(step, words, {"Retry-After": "0"} if step == 429 else {})
        found = self.answer(path, content)
        if found is None:
            return self.reply(404, {"error": {"code": "ResourceNotFound", "message": f"no {path}"}})
        return self.reply(201 if self.command == "PUT" else 200, found)

    do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = handle_any

    def answer(self, path, content):
        server = self.server
        if self.command == "PUT":
            server.resources[path] = {"id": f"{SCOPE}/{path}", "name": path.rsplit("/", 1)[-1], **content}
            if path.startswith("jobs/"):
                properties = server.resources[path]["properties"]
                properties["status"] = "NotStarted"
                properties["services"] = {"Studio": {"endpoint": f"https://ml.azure.com/runs/{path[5:]}"}}
            return server.resources[path]
        if path.endswith("startPendingUpload"):
            return {
                "blobReferenceForConsumption": {
                    "blobUri": f"{server.url}/blob/desk/container", "storageAccountArmId": "/x",
                    "credential": {"credentialType": "SAS", "sasUri": f"{server.url}/blob/desk/container?sig=planted-sas"},
                },
                "pendingUploadId": "1", "pendingUploadType": "TemporaryBlobReference",
            }  # fmt: skip
        if path == "":
            return WORKSPACE
        if path in server.resources:
            return server.resources[path]
        if re.fullmatch(r"computes/[\w-]+", path):
            return {"id": f"{SCOPE}/{path}", "name": path[9:], "location": "here", "properties": COMPUTE}
        if path.endswith("/versions"):
            wanted = parse_qs(urlsplit(self.path).query).get("hash")
            found = [
                value for name, value in server.resources.items()
                if name.startswith("codes/") and [value["properties"]["properties"].get("hash_sha256")] == wanted
            ]  # fmt: skip
            return {"value": found}
        return None

    def blob(self, parts, body):
        query = parse_qs(parts.query)
        if self.command == "PUT":
            metadata = query.get("comp") == ["metadata"]
            if not metadata:
                self.server.blobs[parts.path] = body
            return self.reply(200 if metadata else 201, None, {"ETag": '"1"', "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT"})
        if query.get("comp") == ["list"]:
            empty = '<?xml version="1.0"?><EnumerationResults><Blobs/><NextMarker/></EnumerationResults>'
            return self.reply(200, empty, {"Content-Type": "application/xml"})
        return self.reply(404, None, {"x-ms-error-code": "BlobNotFound"})

    def reply(self, code, content, headers=()):
        body = b"" if content is None else (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def make_transport(url: str):
    """A transport of azure-core that turns to the stand-in, whatever host is asked for."""
    from azure.core.pipeline.transport import RequestsTransport

    class Loopback(RequestsTransport):
        def send(self, request, **options):
            parts = urlsplit(request.url)
            request.url = f"{url}{parts.path}?{parts.query}"
            return super().send(request, **options)

    return Loopback()


class Credential:
    """Gives a token of the form that the client looks into."""

    def __init__(self, secret: str = "plantedsignature"):
        self.secret = secret

    def get_token(self, *scopes, **options):
        from azure.core.credentials import AccessToken

        parts = [{"alg": "none"}, {"aud": scopes[0].removesuffix("/.default"), "oid": "0", "tid": "0"}]
        text = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
        return AccessToken(".".join([*text, self.secret]), 4102444800)
