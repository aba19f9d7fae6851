# make simulate: a federation of 50 clients on this machine.  make test: the tests.  Both make .venv first.
# make docs: the documentation as a site, in build/site.
PYTHON ?= python3

.PHONY: simulate test lint docs

simulate: .venv/installed
	.venv/bin/fedlora simulate --clients 50

# A process a core and one more (tests/conftest.py), each with one thread; a file, whose tests may share a federation,
# stays in one. The tests of optional libraries come after the others and see these libraries alone: where bitsandbytes is
# installed PEFT imports it, which costs every process two seconds.
test: .venv/installed .venv/optional/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not optional_library'
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/optional .venv/bin/python -m pytest -m optional_library tests/models
	$(MAKE) docs

# What trackers are told, each by its own library, in an environment that no other test sees; without a network.
test-trackers: .venv/installed .venv/trackers/installed
	OMP_NUM_THREADS=1 .venv/trackers/bin/python -m pytest tests/run/test_trackers.py

# No function is more complex than 10 by radon, which counts comprehensions and boolean operators too, as ruff does not.
# mypy is shown the packages as a wheel lays them out: it cannot follow fedlora/__init__.py to the folders beside it.
lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	! .venv/bin/radon cc --show-complexity --min C fedlora server client strategies simulations benchmarks | grep .
	rm -rf build/typed && mkdir -p build/typed && cp -r fedlora benchmarks build/typed/
	cp -r server client strategies simulations build/typed/fedlora/
	cd build/typed && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fedlora -p benchmarks

# Warnings are errors: a page outside of mkdocs.yml's list, and a link or an anchor that leads nowhere.
docs: .venv/installed .venv/docs/installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.venv/docs:. .venv/bin/python -m mkdocs build --quiet --strict

# What the images install, with the hashes of all its files for all platforms: constraints.txt without torch and the
# libraries that a build of torch for a GPU asks for, which differ from build to build, and without uv, which installs.
hashes.txt: pyproject.toml constraints.txt
	.venv/bin/uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --generate-hashes \
		--constraint constraints.txt pyproject.toml --output-file .venv/hashes.txt
	awk '/^[a-z]/ { kept = !/^(torch==|triton==|nvidia-|cuda-|uv==)/ } kept' .venv/hashes.txt >hashes.txt

# The exact versions that were run. A torch that is installed already is kept where it satisfies them.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,dev]'
	touch .venv/installed

# What they need in turn is in .venv already.
.venv/optional/installed: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/optional \
		bitsandbytes trl
	touch .venv/optional/installed

# The extra `docs`, beside .venv's own libraries.
.venv/docs/installed: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --upgrade --target .venv/docs \
		mkdocs-material 'mkdocstrings[python]'
	touch .venv/docs/installed

# It sees what .venv has, and has the trackers beside that.
.venv/trackers/installed: .venv/installed
	.venv/bin/python -m venv .venv/trackers
	.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \
		>"$$(.venv/trackers/bin/python -c 'import site; print(site.getsitepackages()[0])')/above.pth"
	.venv/trackers/bin/python -m pip install --quiet --constraint constraints.txt trackio wandb mlflow-skinny
	touch .venv/trackers/installed
