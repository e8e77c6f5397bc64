"""Who offers a model, under which license, and with which hashes: looked up and shown before anything is downloaded.

Two catalogues: the Hugging Face hub, and the public one of Azure AI Foundry, whose models Foundry Local runs.
"""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slmops_course.errors import CourseError

FOUNDRY = "https://ai.azure.com/api/eastus/ux/v1.0"
PAGES = 100  # of the catalogue, at most: a service that always has one more is not waited for
FOUNDRY_PREFIX = "foundry:"


class SourceError(CourseError):
    """A catalogue that cannot be asked, a model that it does not have, or a file that is not the one it names."""


@dataclass(frozen=True)
class File:
    """A file of a model, as its catalogue describes it."""

    size_bytes: int | None
    sha256: str | None = None  # of large files
    git_sha1: str | None = None  # of small ones: git hashes the text "blob SIZE", a zero byte and the content


@dataclass(frozen=True)
class Source:
    """A model in a catalogue."""

    name: str
    catalogue: str  # "Hugging Face hub" or "Azure AI Foundry"
    revision: str  # a commit, or a version: what is downloaded is this and nothing later
    license: str | None  # None: the catalogue names none, so nobody has allowed you anything
    size_bytes: int | None
    files: Mapping[str, File]  # empty where the catalogue names none
    publisher: str | None = None

    def __str__(self):
        size = "unknown size" if self.size_bytes is None else f"{self.size_bytes / 1e6:,.0f} MB"
        by = f" by {self.publisher}" if self.publisher else ""
        lines = [
            f"{self.name}{by} from the {self.catalogue}, revision {self.revision[:12]}, {size}, "
            f"license: {self.license or 'none is named: ask before you use it'}"
        ]
        lines += [f"  {name}  SHA-256 {file.sha256}" for name, file in self.files.items() if file.sha256]
        if len(lines) == 1:
            lines.append("  the catalogue names no hash: what arrives cannot be checked against it")
        return "\n".join(lines)


def describe(model: str, **options) -> Source:
    """A model's entry: `foundry:ALIAS` in the Foundry catalogue, else a hub id.

    Example: describe("HuggingFaceTB/SmolLM2-135M-Instruct").license -> "apache-2.0"
    """
    if model.startswith(FOUNDRY_PREFIX):
        return describe_foundry(model.removeprefix(FOUNDRY_PREFIX), **options)
    return describe_hub(model, **options)


def describe_hub(model: str, *, endpoint: str | None = None) -> Source:
    """What the Hugging Face hub says of a model, with the commit that "main" is now. No token is sent.

    Raises SourceError when the hub does not answer or does not have it.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=endpoint, token=False).model_info(model, revision="main", files_metadata=True)
    except Exception as error:  # the hub's library raises many kinds: for a proxy, a name, a connection, a gated model
        raise SourceError(
            f"The hub does not describe {model!r} ({type(error).__name__}): expected a public model and a reachable hub; "
            "check the id and the connection."
        ) from error
    card = info.card_data.to_dict() if info.card_data else {}
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    files = {
        part.rfilename: File(part.size, part.lfs["sha256"] if part.lfs else None, None if part.lfs else part.blob_id)
        for part in info.siblings or ()
    }
    sizes = [file.size_bytes for file in files.values() if file.size_bytes is not None]
    found = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return Source(
        model, "Hugging Face hub", info.sha or "unknown", found or (tags[0] if tags else None),
        sum(sizes) if sizes else None, files, info.author,
    )  # fmt: skip


def describe_foundry(name: str, *, device: str = "cpu", address: str = FOUNDRY, timeout_s: float = 30.0) -> Source:
    """The newest version of a model in the Foundry catalogue, by its alias or full name, for a device.

    Raises SourceError when there is none, naming those that there are.
    """
    entries = list(foundry_entries(device=device, address=address, timeout_s=timeout_s))
    found = [entry for entry in entries if name.lower() in (_alias(entry).lower(), entry["properties"]["name"].lower())]
    if not found:
        names = sorted({_alias(entry) for entry in entries})
        raise SourceError(f"The Foundry catalogue has no {name!r} for {device}: expected one of {', '.join(names) or 'none'}.")
    return _foundry_source(max(found, key=lambda entry: int(entry["properties"]["version"])))


def foundry_entries(*, device: str = "cpu", address: str = FOUNDRY, timeout_s: float = 30.0) -> Iterator[dict]:
    """The catalogue's entries for a device, page by page; those without a name, version or address are left out.

    The request has the form of Foundry Local's own, https://github.com/microsoft/Foundry-Local
    """
    token, skip = None, None
    for _ in range(PAGES):
        wanted = {"type": "models", "kind": "Versioned", "properties/variantInfo/variantMetadata/device": device}
        filters = [{"field": field, "operator": "eq", "values": [value]} for field, value in wanted.items()]
        filters.append({"field": "annotations/tags/foundryLocal", "operator": "eq", "values": [""]})
        request = {"filters": filters, "pageSize": 50, "skip": skip, "continuationToken": token}
        body = {
            "resourceIds": [{"resourceId": "azureml", "entityContainerType": "Registry"}], "indexEntitiesRequest": request
        }  # fmt: skip
        page = _post(f"{address}/entities/crossRegion", body, timeout_s)
        for entry in page.get("value") or ():
            properties = entry.get("properties") or {}
            if entry.get("assetId") and properties.get("name") and str(properties.get("version", "")).isdecimal():
                yield entry
        token, skip = page.get("continuationToken"), page.get("nextSkip")
        if not token:
            return


def _post(url: str, body: Mapping, timeout_s: float) -> dict:
    headers = {"Content-Type": "application/json", "User-Agent": "AzureAiStudio"}  # the catalogue turns others away
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return dict(json.load(answer)["indexEntitiesResponse"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"HTTP status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        raise SourceError(
            f"The Foundry catalogue gave no list of models ({said}): expected it to be reachable; connect, or try again later."
        ) from None


def _alias(entry: Mapping) -> str:
    return (entry.get("annotations") or {}).get("tags", {}).get("alias") or entry["properties"]["name"]


def _foundry_source(entry: Mapping) -> Source:
    notes = entry.get("annotations") or {}
    tags, metadata = notes.get("tags") or {}, (entry["properties"].get("variantInfo") or {}).get("variantMetadata") or {}
    return Source(
        entry["properties"]["name"], "Azure AI Foundry", str(entry["properties"]["version"]),
        tags.get("license") or tags.get("licenseDescription"), metadata.get("fileSizeBytes"), {},
        (notes.get("systemCatalogData") or {}).get("publisher"),
    )  # fmt: skip


def check_files(folder: Path, source: Source) -> None:
    """Compare what was downloaded with what its catalogue names.

    Raises SourceError for a file with another hash, and for weights that are missing.
    """
    for name, file in source.files.items():
        path = folder / name
        if not path.is_file():
            if name.endswith(".safetensors"):
                raise SourceError(f"{source.name} came without {name}, which its catalogue names: fetch it again.")
            continue
        found, expected = _hash(path, file)
        if found != expected:
            raise SourceError(
                f"{name} of {source.name} has the hash {found[:12]}…, expected {expected[:12]}… by its catalogue: it was "
                "changed or damaged on the way; delete it and fetch it again."
            )


def _hash(path: Path, file: File) -> tuple[str, str]:
    if file.sha256:
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest(), file.sha256
    if file.git_sha1:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest(), file.git_sha1
    return "", ""
