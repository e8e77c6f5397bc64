# `make course` runs the course, `make test` checks it. Both make the environment first, where it is not there yet.
# Paths are relative and tools are called as `python -m`, so that a folder with a space in its name will do: a console
# script's first line cannot hold such a path.
#
# Another Python:   make course PYTHON=python3.12
# Another index:    pip's own settings and variables apply. On Linux, PyTorch's CPU index saves several gigabytes.

PYTHON ?= python3

.PHONY: course test check soak clean

course: .venv/.installed .venv/.tools
	.venv/bin/python -m slmops_course.cli chapters
	.venv/bin/python -m slmops_course.cli report

test: .venv/.installed .venv/.tools .venv/.co-op
	.venv/bin/python -m ruff check .
	.venv/bin/python -m pytest

# What CI runs.
check: test

# The faults and the load of the tests, for ten minutes of storms and 50 kills.
soak: .venv/.installed
	.venv/bin/python -m slmops_course.soak --minutes 10 --kills 50 --clients 16 --seed 0

# Throws away what was computed, and keeps the environment.
clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find slmops_course tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first and alone: pip then keeps the build that its settings choose.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	.venv/bin/python -m pip install -e ".[test]" -c constraints.txt
	@touch .venv/.installed

# Prometheus, its checker promtool with it, and fonts for Devanagari and Malayalam, out of Debian's packages and into the
# environment: nothing is installed on the machine. What needs them does without where they are not there, and says so.
.venv/.tools: | .venv/.installed
	@mkdir -p .venv/debian .venv/share/fonts; cd .venv/debian && { \
	  command -v promtool >/dev/null || { $(call unpack,prometheus) && cp usr/bin/prometheus usr/bin/promtool ../bin/; } || \
	  echo "No Prometheus here: tests and chapters do without." >&2; \
	  { $(call unpack,fonts-noto-core) && cp usr/share/fonts/truetype/noto/NotoSansDevanagari-*.ttf \
	    usr/share/fonts/truetype/noto/NotoSansMalayalam-*.ttf ../share/fonts/; } || \
	  echo "No fonts here for Devanagari and Malayalam: figures in these scripts need the machine's own." >&2; }
	@touch .venv/.tools

unpack = { apt-get download $(1) || { apt-get update && apt-get download $(1); }; } >$(1).log 2>&1 && dpkg -x $(1)_*.deb .

# Co-op Translator's review command, an outside eye on the translations. It asks for another openai than the course.
.venv/.co-op: | .venv/.installed
	"$(PYTHON)" -m venv .venv/co-op
	.venv/co-op/bin/python -m pip install co-op-translator==0.23.2
	@touch .venv/.co-op

.venv/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	  echo "$(PYTHON) answers '$$("$(PYTHON)" --version 2>&1)', but the course needs Python 3.11 or 3.12: install one and run, for example, make course PYTHON=python3.11" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }
