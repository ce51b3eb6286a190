# Everything runs in .venv, installed on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint checkpoints compare calibrate-table calibrate-sweep figures clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[test]"
	touch $@

# 1,000 guided digits, measured and drawn.
demo: $(INSTALLED)
	$(BIN)/calib-guidance predict --config lightning_configs/predict/digits.yaml

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# How checkpoints/digits was made. Replaces it.
checkpoints: $(INSTALLED)
	$(BIN)/calib-guidance fit --config lightning_configs/fit/digits_classifier.yaml
	$(BIN)/calib-guidance fit --config lightning_configs/fit/digits_judge.yaml
	$(BIN)/calib-guidance fit --config lightning_configs/fit/digits_diffusion.yaml
	$(BIN)/calib-guidance fit --config lightning_configs/fit/digits_noise_aware.yaml

# The table of the README.
compare: $(INSTALLED)
	$(BIN)/calib-guidance compare --config lightning_configs/compare/digits.yaml --into README.md

# The tables of the README on calibration, and the sweep over λ and β in docs/.
calibrate-table: $(INSTALLED)
	$(BIN)/calib-guidance compare --config lightning_configs/compare/calibration.yaml --output outputs/calibration --into README.md
calibrate-sweep: $(INSTALLED)
	$(BIN)/calib-guidance compare --config lightning_configs/compare/calibration_sweep.yaml --output outputs/calibration_sweep
	$(BIN)/python docs/calibration_sweep.py outputs/calibration_sweep/runs.csv

# The pictures of the README and of docs/.
figures: demo
	mkdir -p docs/images
	cp outputs/digits/figures/*.png docs/images/
	$(BIN)/python docs/gaussian_mixture.py
	$(BIN)/python docs/overconfidence.py

clean:
	rm -rf $(VENV) outputs build *.egg-info
