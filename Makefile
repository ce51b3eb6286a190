# Everything runs in .venv, installed on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's build, as uv names it: `make install TORCH_BACKEND=cpu` installs no CUDA libraries. Empty: what PyPI has.
TORCH_BACKEND ?=
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint docs checkpoints compare calibrate-table calibrate-sweep few-steps sweep-ranking guidance-cost benchmarks plots clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV). PyTorch and, on Linux, its CUDA libraries are most of the download."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) --editable ".[test]"
	touch $@

# 1,000 guided digits, measured and drawn.
demo: $(INSTALLED)
	$(BIN)/calib-guidance predict --config digits

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Bytecode is kept: some forty tests start a process of their own, which would compile all of the package again.
test: lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The site, in build/site: a broken link or reference is an error. Runs the notebook; needs no network once installed.
$(VENV)/.docs: $(INSTALLED)
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# How checkpoints/digits was made. Replaces it.
checkpoints: $(INSTALLED)
	for name in classifier eval_classifier noise_aware diffusion flow; do $(BIN)/calib-guidance fit --config digits_$$name || exit 1; done
	for name in classifier eval_classifier noise_aware; do \
	  cp outputs/digits_$$name/classifier.safetensors checkpoints/digits/$$name.safetensors || exit 1; done
	for name in diffusion flow; do \
	  cp outputs/digits_$$name/network.safetensors checkpoints/digits/$$name.safetensors || exit 1; done

# The tables of docs/results.md.
compare: $(INSTALLED)
	$(BIN)/calib-guidance experiment --config digits --into docs/results.md
	$(BIN)/calib-guidance experiment --config digits_flow --into docs/results.md

# The tables and the plot of docs/calibration.md.
calibrate-table: $(INSTALLED)
	$(BIN)/calib-guidance experiment --config calibration --into docs/calibration.md
calibrate-sweep: $(INSTALLED)
	$(BIN)/calib-guidance experiment --config calibration_sweep
	$(BIN)/python docs/calibration_sweep.py outputs/experiments/calibration_sweep/runs.csv

# Digits against NFE: docs/few_steps.md. What docs/few_steps.json has is not measured again.
few-steps: $(INSTALLED)
	$(BIN)/python docs/few_steps.py --pages docs/few_steps.md

# How often few samples find the best setting: docs/experiments.md.
sweep-ranking: $(INSTALLED)
	$(BIN)/python docs/sweep_ranking.py

# Quality against the number of gradients: docs/guidance_cost.md.
guidance-cost: $(INSTALLED)
	$(BIN)/python docs/guidance_cost.py

# The report of the demo and the pictures of the README and of docs/.
plots: demo few-steps
	cp outputs/digits/plots/*.png outputs/digits/plots/*.gif docs/images/
	$(BIN)/calib-guidance report outputs/digits
	$(BIN)/calib-guidance predict --config digits --config run/guidance_grid --trainer.callbacks.index 3 --data.num_samples 20 \
	  --trainer.default_root_dir outputs/guidance_grid
	cp outputs/guidance_grid/plots/guidance_grid.png docs/images/
	$(BIN)/python docs/first_picture.py
	$(BIN)/python docs/gaussian_mixture.py
	$(BIN)/python docs/guidance_rules.py
	$(BIN)/python docs/overconfidence.py

# Ratios of this machine against those of benchmarks/baseline.json; names what got slower. For an idle machine, about 20 minutes.
benchmarks: $(INSTALLED)
	mkdir -p outputs
	rm -f outputs/benchmarks.json
	for part in start_up sampling_step guidance_share against_diffusers systems scaling fit_step metrics "run_folder --only-table"; do \
	  set -- $$part; $(BIN)/python benchmarks/$$1.py $$2 --json outputs/benchmarks.json || exit 1; done
	$(BIN)/python benchmarks/compare.py outputs/benchmarks.json

clean:
	rm -rf $(VENV) outputs build *.egg-info
