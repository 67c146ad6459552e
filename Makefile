# Two commands: `make toy` (train and draw, about 3 minutes) and `make test` (the oracles). Both make their own .venv.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: toy test slow claims bench publish lint clean

toy: $(STAMP)            ## train teacher, baseline and TMD on two spirals and draw them
	$(RUN) toy_2d.py --resume

test: $(STAMP)           ## lint, then every test that is not marked slow
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -m "not slow"

slow: $(STAMP)           ## the tests marked slow: default-sized runs
	$(RUN) -m pytest -q -m slow

claims: $(STAMP)         ## the paper's claims in the plane, three seeds (about an hour, resumable)
	$(RUN) toy_2d.py --claims

bench: $(STAMP)          ## steps per second of every stage against their matmuls alone
	$(RUN) toy_2d.py --bench

publish: $(STAMP)        ## copy measured numbers and pictures to results/ and set the README's tables from them
	$(RUN) publish.py

lint: $(STAMP)
	$(RUN) -m ruff check .

$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
