# Everything runs in .venv, installed on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch's build, as uv names it: `make install TORCH_BACKEND=cpu` installs no CUDA libraries. Empty: what PyPI has.
TORCH_BACKEND ?=
INSTALLED := $(VENV)/.installed

.PHONY: install demo demo-cifar10 test lint docs checkpoints checkpoints-cifar10 results compare tuned calibrate-table calibrate-sweep cifar10 few-steps sweep-ranking guidance-cost benchmarks plots clean

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

# 500 guided CIFAR-10 images of 16×16 pixels, measured and drawn.
demo-cifar10: $(INSTALLED)
	$(BIN)/calib-guidance predict --config cifar10

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
	for name in classifier eval_classifier noise_aware diffusion flow weak edm2; do $(BIN)/calib-guidance fit --config digits_$$name || exit 1; done
	for name in classifier eval_classifier noise_aware; do \
	  cp outputs/digits_$$name/classifier.safetensors checkpoints/digits/$$name.safetensors || exit 1; done
	for name in diffusion flow weak; do \
	  cp outputs/digits_$$name/network.safetensors checkpoints/digits/$$name.safetensors || exit 1; done
	$(BIN)/calib-guidance ema outputs/digits_edm2/ema --std 0.1 --half --output checkpoints/digits/edm2.safetensors
	$(BIN)/calib-guidance ema outputs/digits_edm2/ema --std 0.1 --half --images 6400 --output checkpoints/digits/edm2_early.safetensors

# How checkpoints/cifar10 was made, from the Hub's images. Replaces it; hours.
checkpoints-cifar10: $(INSTALLED)
	$(BIN)/python docs/cifar10.py
	for name in classifier eval_classifier noise_aware diffusion; do $(BIN)/calib-guidance fit --config cifar10_$$name || exit 1; done
	for name in classifier eval_classifier noise_aware; do \
	  cp outputs/cifar10_$$name/classifier.safetensors checkpoints/cifar10/$$name.safetensors || exit 1; done
	$(BIN)/calib-guidance ema outputs/cifar10_diffusion/ema --std 0.05 --half --output checkpoints/cifar10/diffusion.safetensors
	$(BIN)/calib-guidance fit --config cifar10_calibration --config cifar10/denoised_inputs --config objective/smooth_ece_binned
	cp outputs/cifar10_calibration/classifier.safetensors checkpoints/cifar10/classifier_x0.safetensors
	rm -f checkpoints/cifar10/heldout.npz
	$(BIN)/calib-guidance reference data/cifar10_16 --split "test[:30%]" --keep-features \
	  --features classifier:outputs/cifar10_eval_classifier/classifier.yaml --output checkpoints/cifar10/heldout.npz

# All results of the README and docs/, from the weights in checkpoints/. What is done is not done again; hours from nothing.
results: compare tuned calibrate-table calibrate-sweep cifar10 few-steps sweep-ranking guidance-cost

# The tables of docs/results.md at one scale.
compare: $(INSTALLED)
	$(BIN)/calib-guidance experiment --config digits --into docs/results.md
	$(BIN)/calib-guidance experiment --config digits_flow --into docs/results.md
	$(BIN)/calib-guidance experiment --config digits_edm2 --into docs/results.md

# Every score, rule and negative at its own best: the tables of the README, docs/results.md and docs/which_guidance.md.
tuned: $(INSTALLED)
	for name in scores joint rules autoguidance; do $(BIN)/calib-guidance tune --config digits_$$name || exit 1; done
	$(BIN)/python docs/tuned_scores.py outputs/experiments/digits_scores
	$(BIN)/python docs/tuned_scores.py outputs/experiments/digits_joint --results docs/digits_joint.json
	$(BIN)/calib-guidance experiment --config digits_scores_confirmed --into docs/results.md
	$(BIN)/python docs/cost_of_a_number.py
	$(BIN)/python docs/which_guidance.py outputs/experiments/digits_rules outputs/experiments/digits_autoguidance

# The tables of docs/cifar10.md; data/cifar10_16 has to be there.
cifar10: $(INSTALLED)
	$(BIN)/calib-guidance experiment --config cifar10_networks --into docs/cifar10.md
	$(BIN)/calib-guidance experiment --config cifar10_calibration --into docs/cifar10.md
	$(BIN)/calib-guidance experiment --config cifar10_claims --into docs/cifar10.md
	$(BIN)/calib-guidance experiment --config cifar10_recipe --into docs/cifar10.md
	for name in scores joint; do $(BIN)/calib-guidance tune --config cifar10_$$name || exit 1; done
	$(BIN)/python docs/tuned_scores.py outputs/experiments/cifar10_scores --results docs/cifar10_scores.json --page docs/cifar10.md
	$(BIN)/python docs/tuned_scores.py outputs/experiments/cifar10_joint --results docs/cifar10_joint.json --page docs/cifar10.md
	$(BIN)/python docs/cost_of_a_number.py --results docs/cifar10_scores.json --prefix cifar10_

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
