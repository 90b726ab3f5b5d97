# make demo: the main job on the embedded default     make test: everything CI runs
# make wheel: dist/detoxrl-VERSION-py3-none-any.whl     make models: train the packaged models again, and compare
# make soak: a hundred kills, each run resumed and compared with one that was never stopped
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet -c constraints.txt

.PHONY: demo test wheel models soak clean

demo: .venv/demo-installed
	.venv/bin/detoxrl run quickstart --overwrite

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

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline]'
	touch $@

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[offline,similarity,track,dev]'
	touch $@ .venv/demo-installed

clean:
	rm -rf .venv runs dist
