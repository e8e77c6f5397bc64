"""Translations of the README and the chapters: gettext catalogues, rendering, checks.

`translations/LANGUAGE/po/` is the source of truth; `README.md` and `notebooks/` beside it are rendered from it.
"""
