"""What catalogues say of a model is read by real clients from a server on loopback that answers in the catalogues' form."""

import hashlib
import http.server
import json
import threading

import pytest

from slmops_course.artifacts import Store
from slmops_course.models import ModelError, get_model
from slmops_course.sources import File, Source, SourceError, check_files, describe, describe_foundry, describe_hub

COMMIT = "7e27bd9f95328f0f3b08261d1252705110c806f8"
WEIGHTS = hashlib.sha256(b"weights").hexdigest()
# In the form of https://huggingface.co/docs/hub/api, with `blobs`.
HUB = {
    "id": "somebody/small-model", "author": "somebody", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
    "pipeline_tag": "text-generation", "library_name": "transformers", "downloads": 7, "likes": 1,
    "tags": ["transformers", "safetensors", "license:apache-2.0", "region:us"],
    "cardData": {"license": "apache-2.0", "language": ["en"]}, "lastModified": "2026-01-02T03:04:05.000Z",
    "siblings": [
        {"rfilename": "config.json", "size": 2, "blobId": hashlib.sha1(b"blob 2\0{}").hexdigest()},
        {"rfilename": "model.safetensors", "size": 7, "blobId": "0" * 40,
         "lfs": {"sha256": WEIGHTS, "size": 7, "pointerSize": 134}},
    ],
}  # fmt: skip


def entry(name, version, *, alias="tiny-desk", tags=None, **more):
    """An entry in the form that Foundry Local's own client reads."""
    return {
        "assetId": f"azureml://registries/azureml/models/{name}/versions/{version}", "entityId": f"{name}:{version}",
        "annotations": {
            "tags": {"alias": alias, "foundryLocal": "", "task": "chat-completion", "license": "MIT"} | (tags or {}),
            "systemCatalogData": {"publisher": "Somebody", "displayName": alias},
        },
        "properties": {
            "name": name, "version": version,
            "variantInfo": {"parents": [], "variantMetadata": {"device": "cpu", "fileSizeBytes": 4_000_000}},
        },
    } | more  # fmt: skip


def page(*entries, token=""):
    found = {"totalCount": len(entries), "value": list(entries), "nextSkip": len(entries) if token else 0}
    return {"indexEntitiesResponse": found | {"continuationToken": token}}


@pytest.fixture
def catalogue():
    """Answers each request with the next of its answers, the last again and again; keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.asked.append((self.path, json.loads(body) if body else None, self.headers.get("Authorization")))
            answers = self.server.answers
            found = answers.pop(0) if len(answers) > 1 else answers[0]
            status, text = found if isinstance(found, tuple) else (200, json.dumps(found))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answers, server.asked = [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# --- The hub ---


def test_the_hub_names_license_revision_and_hashes(catalogue):
    catalogue.answers = [HUB]
    source = describe_hub("somebody/small-model", endpoint=catalogue.url)
    assert (source.license, source.revision, source.size_bytes, source.publisher) == ("apache-2.0", COMMIT, 9, "somebody")
    assert source.files["model.safetensors"] == File(7, WEIGHTS, None)
    assert catalogue.asked[0][0].startswith("/api/models/somebody/small-model/revision/main?blobs=")
    assert catalogue.asked[0][2] is None, "no token is sent"
    assert "license: apache-2.0" in str(source)
    assert f"model.safetensors  SHA-256 {WEIGHTS}" in str(source)
    assert COMMIT[:12] in str(source)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cardData": None}, "apache-2.0"),
        ({"cardData": {"license": "other", "license_name": "llama3.2"}}, "llama3.2"),
        ({"cardData": None, "tags": []}, None),
    ],
)
def test_a_license_is_found_where_it_is_named_and_said_to_be_missing_where_not(catalogue, change, expected):
    catalogue.answers = [HUB | change]
    source = describe_hub("somebody/small-model", endpoint=catalogue.url)
    assert source.license == expected
    assert ("none is named" in str(source)) == (expected is None)


def test_a_hub_that_names_no_files_is_said_to_do_so(catalogue):
    catalogue.answers = [{"id": "a/b", "sha": COMMIT}]
    source = describe_hub("a/b", endpoint=catalogue.url)
    assert (source.files, source.size_bytes) == ({}, None)
    assert "names no hash" in str(source)


@pytest.mark.parametrize("answer", [(404, '{"error": "Repository not found"}'), (401, "{}"), (200, "<html>"), (500, "")])
def test_a_hub_without_the_model_is_one_sentence(catalogue, answer):
    catalogue.answers = [answer]
    with pytest.raises(SourceError, match=r"The hub does not describe 'a/b' .*check the id and the connection"):
        describe_hub("a/b", endpoint=catalogue.url)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": b"{}", "model.safetensors": b"weights"}, None),
        ({"model.safetensors": b"weights", "extra.txt": b"?"}, None),
        ({"config.json": b"{}", "model.safetensors": b"WEIGHTS"}, "model.safetensors of .* has the hash"),
        ({"config.json": b"[]", "model.safetensors": b"weights"}, "config.json of .* has the hash"),
        ({"config.json": b"{}"}, "came without model.safetensors"),
        ({}, "came without model.safetensors"),
    ],
)
def test_what_arrives_is_what_was_named(catalogue, tmp_path, files, says):
    catalogue.answers = [HUB]
    source = describe_hub("somebody/small-model", endpoint=catalogue.url)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if says:
        with pytest.raises(SourceError, match=says):
            check_files(tmp_path, source)
    else:
        check_files(tmp_path, source)


# --- Foundry ---


def test_the_foundry_catalogue_names_license_publisher_and_size(catalogue):
    versions = [entry("tiny-desk-generic-cpu", number) for number in (1, 3, 2)]
    catalogue.answers = [page(*versions, entry("other", 9, alias="o"))]
    source = describe("foundry:Tiny-Desk", address=catalogue.url)
    assert (source.name, source.revision, source.license) == ("tiny-desk-generic-cpu", "3", "MIT")
    assert (source.publisher, source.size_bytes) == ("Somebody", 4_000_000)
    assert "by Somebody from the Azure AI Foundry, revision 3, 4 MB, license: MIT" in str(source)
    assert "names no hash" in str(source)
    path, asked, _ = catalogue.asked[0]
    assert path == "/entities/crossRegion"
    assert asked["resourceIds"] == [{"resourceId": "azureml", "entityContainerType": "Registry"}]
    device = {"field": "properties/variantInfo/variantMetadata/device", "operator": "eq", "values": ["cpu"]}
    assert device in asked["indexEntitiesRequest"]["filters"]


def test_all_pages_are_read(catalogue):
    catalogue.answers = [page(entry("a", 1, alias="a"), token="more"), page(entry("b", 2, alias="b"))]
    assert describe_foundry("b", address=catalogue.url).revision == "2"
    assert [asked["indexEntitiesRequest"]["continuationToken"] for _, asked, _ in catalogue.asked] == [None, "more"]
    assert catalogue.asked[1][1]["indexEntitiesRequest"]["skip"] == 1


def test_a_catalogue_without_an_end_is_left(catalogue):
    catalogue.answers = [page(entry("a", 1), token="always")]
    with pytest.raises(SourceError, match="has no 'z'"):
        describe_foundry("z", address=catalogue.url)
    assert len(catalogue.asked) == 100


def test_entries_that_are_none_are_left_out_and_the_others_named(catalogue):
    broken = [entry("x", 1, assetId=None), entry("", 1), entry("y", "latest"), {"assetId": "z"}, {}]
    catalogue.answers = [page(*broken, entry("a", 1, alias="good"))]
    with pytest.raises(SourceError, match=r"has no 'x' for cpu: expected one of good\."):
        describe_foundry("x", address=catalogue.url)
    catalogue.answers = [page()]
    with pytest.raises(SourceError, match="expected one of none"):
        describe_foundry("x", address=catalogue.url)


@pytest.mark.parametrize("answer", [(500, ""), (429, "{}"), (200, "<html>"), (200, "[]"), (200, "{}")])
def test_a_catalogue_that_does_not_answer_is_one_sentence(catalogue, answer):
    catalogue.answers = [answer]
    with pytest.raises(SourceError, match="The Foundry catalogue gave no list of models"):
        describe_foundry("x", address=catalogue.url)


def test_a_model_of_the_foundry_catalogue_is_not_taken_for_one_to_train(tmp_path):
    with pytest.raises(ModelError, match="'foundry:phi-4-mini' is a model of the Foundry catalogue, compiled for running"):
        get_model(Store(tmp_path), "foundry:phi-4-mini")


def test_a_source_without_anything_is_still_a_sentence():
    assert "unknown size, license: none is named" in str(Source("a/b", "Hugging Face hub", "main", None, None, {}))
