# `make demo` and `make test`, each with what it needs in .venv. `make test-slow` runs the tests that take longest,
# `make test-floor` all of them with the lowest versions that are promised, in .venv-floor. `make notebooks` executes the
# notebooks at full size.
PYTHON ?= python3
CPU_BUILDS := https://download.pytorch.org/whl/cpu
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-floor notebooks address

demo: .venv/demo
	.venv/bin/python train.py --channels 48 --kd none out lift place --lambda-feat 0 --steps 1200 --eval-samples 1000 --out runs/demo

test: .venv/installed
	.venv/bin/python $(PYTEST)

test-slow: .venv/installed
	.venv/bin/python $(PYTEST) -m slow

test-floor: .venv-floor/installed
	.venv-floor/bin/python $(PYTEST) -m "not soak"

notebooks: .venv/installed
	rm -rf notebooks/runs
	.venv/bin/python notebooks/run.py

# Without a GPU PyTorch's CPU builds do, a tenth of the size. Settings of pip could lead past their index: it ignores them.
.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	command -v nvidia-smi || PIP_CONFIG_FILE=/dev/null .venv/bin/python -m pip install --isolated --quiet \
		--retries 0 --timeout 10 --index-url $(CPU_BUILDS) torch torchvision \
		|| echo "PyTorch's CPU builds cannot be had here: the ordinary ones are installed"
	.venv/bin/python -m pip install --quiet --editable ".[train]"
	touch $@

.venv/installed: .venv/demo requirements.txt
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv-floor/installed: requirements.txt tests/floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --requirement requirements.txt --constraint tests/floor.txt
	touch $@

# Once a copy has an address, `make address REPOSITORY=https://github.com/OWNER/NAME` gives it badges and its notebooks a home.
address:
	sed -i.bak 's|^.*<!-- badges -->|[![tests]($(REPOSITORY)/actions/workflows/tests.yml/badge.svg)]($(REPOSITORY)/actions) [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/$(REPOSITORY:https://github.com/%=%)/blob/main/notebooks/01_lift_and_place.ipynb) <!-- badges -->|' README.md
	sed -i.bak 's|"REPOSITORY = \\"[^\\]*\\"|"REPOSITORY = \\"$(REPOSITORY)\\"|' notebooks/*.ipynb
	rm -f README.md.bak notebooks/*.ipynb.bak
