# Two commands do everything on a machine with Python, make and pip: `make demo` and `make test`. `make study` tries the paper's claims.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo docs study test test-slow test-faults lint clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/demo.sh

# The site, into site/: open site/index.html. It needs no network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Claims of the paper at small scale, into docs/study.md: some hours of a core's work. STUDY=large: all of them, a night and more; STUDY_MINUTES=9 ends it in
# time. What docs/study.jsonl has is not measured again.
study: $(STAMP)
	$(BIN)/python -m benchmarks.study $(if $(filter large,$(STUDY)),--large) $(if $(STUDY_MINUTES),--minutes $(STUDY_MINUTES))

# Two files of tests at a time, the longest first: those wait for their Rays most of the time.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs/demo site
