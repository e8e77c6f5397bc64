"""The metadata of Co-op Translator, with which its own review command finds our translations fresh, or stale.

It has one file a language, `.co-op-translator.json`, by the source's path: the MD5 of the source's bytes, a date, the path,
the language. Source: `utils/common/metadata_utils.py` in https://github.com/Azure/co-op-translator, version 0.23.2.

Its review asks for no key and opens no connection:

    co-op-review -r . --include README.md --include "notebooks/*.ipynb" -l "hi ne mr ml"

Only rendering writes a hash. Looking never does, or a stale translation would turn fresh by being looked at.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

FILE = ".co-op-translator.json"


def source_hash(path: Path) -> str:
    """The MD5 of a file's bytes, in hexadecimal. It tells versions apart and protects nothing."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def format_metadata(root: Path, language: str, revised: Mapping[str, str]) -> str:
    """The metadata of a language's translations as Co-op Translator writes it.

    `revised` has, by the path of each English document, when its catalogue was last revised. The time of rendering is not
    in it, so that the same catalogue gives the same bytes.
    """
    entries = {
        path: {
            "original_hash": source_hash(root / path), "translation_date": date, "source_file": path, "language_code": language,
        }
        for path, date in sorted(revised.items())
    }  # fmt: skip
    return json.dumps(entries, indent=2, ensure_ascii=False)


def find_stale(root: Path, language: str, paths: list[str]) -> list[str]:
    """Documents whose English is another than the one they were rendered from, or that have no metadata."""
    file = root / "translations" / language / FILE
    try:
        stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        stored = {}
    return [path for path in paths if stored.get(path, {}).get("original_hash") != source_hash(root / path)]
