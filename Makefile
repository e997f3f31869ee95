# The two commands: `make demo` and `make test`. Both make .venv from requirements.txt first.
PYTHON ?= python3

.PHONY: demo test

demo: .venv/installed
	.venv/bin/python train.py --kd none out lift place --lambda-feat 0 --steps 1200 --eval-samples 1000 --out runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
