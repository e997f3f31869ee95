# `make demo` and `make test`; `make notebooks` executes the notebooks at full size. All make .venv from requirements.txt.
PYTHON ?= python3

.PHONY: demo test notebooks

demo: .venv/installed
	.venv/bin/python train.py --kd none out lift place --lambda-feat 0 --steps 1200 --eval-samples 1000 --out runs/demo

test: .venv/installed
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

notebooks: .venv/installed
	rm -rf notebooks/runs
	.venv/bin/python notebooks/run.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
