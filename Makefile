# `make demo` and `make test` are all a new machine needs; both set up .venv first and are quick the second time.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Where `make real` has its model from, and where it writes.
SMOLLM2 ?= $(HOME)/.cache/agentic_rag_env/smollm2
RUN := outputs/real/$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: demo real test nightly lowest benchmark gpu-check lint clean

demo: $(READY)
	$(BIN)/python -m algorithms.run algo=dgpo

# A pretrained model of 135M parameters learns to search Wikipedia passages from 240 demonstrations.
real: $(SMOLLM2)/config.json
	$(BIN)/python -m algorithms.run algo=sft model=smollm2_135m model.policy=$(SMOLLM2) dataset=nq_mini \
		algo.num_demonstrations=240 env.max_turns=2 hydra.run.dir=$(RUN)
	$(BIN)/python -m algorithms.evaluate checkpoint=$(RUN) evaluation.num_questions=500 evaluation.temperatures=[0] \
		probes=[] hydra.run.dir=$(RUN)/test
	@echo 'Ask it: $(BIN)/python -m algorithms.ask checkpoint=$(RUN)'

$(SMOLLM2)/config.json: | $(READY)
	$(BIN)/python -m algorithms.assets.smollm2 --out $(SMOLLM2)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -p no:benchmark

nightly: $(READY)
	$(BIN)/python -m pytest -m nightly

# The environment's tests with the lowest versions that pyproject.toml allows, in an environment of their own.
lowest:
	rm -rf $(VENV)-lowest
	$(PYTHON) -m venv $(VENV)-lowest
	$(PYTHON) tests/lowest_versions.py serve faiss stem > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VENV)-lowest/constraints.txt ".[serve,faiss,stem]" pytest hypothesis scipy
	$(VENV)-lowest/bin/python -m pytest tests/agentic_rag_env \
		--ignore tests/agentic_rag_env/test_datasets.py --ignore tests/agentic_rag_env/retrievers/test_indexing.py  # Hydra, torch

benchmark: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Everything that a GPU can show, and a small form of it where there is none.
gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-lowest
