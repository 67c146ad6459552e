# `make toy` (train and draw, about 3 minutes), `make video` (about 10), `make wan` (about 1) and `make test`. Each makes .venv itself.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
WAN    := $(VENV)/.installed-wan

.PHONY: toy video video-teacher wan test quick-test slow claims video-sweep video-claims bench bench-gpu smoke-gpu rehearse
.PHONY: tutorials publish lint clean

toy: $(STAMP)            ## train teacher, baseline and TMD on two spirals and draw them
	$(RUN) toy_2d.py --resume

video: $(STAMP)          ## the same on tiny videos with prompts: baseline, TMD, contact sheet (the teacher is in results/)
	$(RUN) toy_video.py

video-teacher: $(STAMP)  ## the teachers of tiny videos, trained once (some four hours on a core, resumable)
	$(RUN) -m toys.video_teacher
	$(RUN) -m toys.video_teacher --frames 12
	$(RUN) -m toys.video_teacher --blocks 3

wan: $(WAN)              ## the whole of wan_scale/ on a tiny random Wan: data, both stages, mp4s, score sheet
	$(RUN) wan_scale/run.py --preset tiny

test: $(WAN)             ## lint, then every test that is not marked slow
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

quick-test: $(STAMP)     ## the inner loop, under a minute: the method against closed forms, the layout, the pages
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q tests/test_tmd.py tests/test_oracles.py tests/test_layout.py tests/test_docs.py

slow: $(WAN)             ## the tests marked slow: default-sized runs
	$(RUN) -m pytest -q -m slow

claims: $(STAMP)         ## the paper's claims in the plane, five seeds (an hour or two on two cores, resumable)
	$(RUN) toy_2d.py --claims

video-sweep: $(STAMP)    ## stage 2's rate and GAN weight on moving shapes, the same few values for both methods (resumable)
	$(RUN) toy_video.py --sweep

video-claims: $(STAMP)   ## the paper's claims on moving shapes, five seeds (a night on two cores, resumable)
	$(RUN) toy_video.py --claims

bench: $(STAMP)          ## steps per second of every stage against their matmuls alone
	$(RUN) toy_2d.py --bench
	$(RUN) toy_video.py --bench

bench-gpu: $(WAN)        ## seconds and memory of wan_scale/ at full size on a GPU, into wan_scale/bench_results/ (nine minutes)
	$(RUN) wan_scale/run.py bench --preset 1.3b --bench-minutes 4
	$(RUN) wan_scale/run.py bench --preset 14b --bench-minutes 4
	$(RUN) -m results.publish

smoke-gpu: $(WAN)        ## does it run on this GPU: every step of wan_scale/ at 1.3B with random weights, a few updates each
	$(RUN) wan_scale/run.py smoke --preset 1.3b

rehearse: $(WAN)         ## every row of the plan's table at full size without a GPU: bytes and FLOPs counted (a quarter of an hour)
	$(RUN) wan_scale/run.py rehearse --preset 1.3b --gpus 1 --card-gb 80
	$(RUN) wan_scale/run.py rehearse --preset 1.3b --gpus 8 --card-gb 80
	$(RUN) wan_scale/run.py rehearse --preset 14b --gpus 1 --lora 64
	$(RUN) wan_scale/run.py rehearse --preset 14b --gpus 8
	$(RUN) wan_scale/run.py rehearse --preset 14b --gpus 64 --card-gb 80
	$(RUN) wan_scale/run.py rehearse --preset 1.3b --phase sampling
	$(RUN) wan_scale/run.py rehearse --preset 14b --phase sampling
	$(RUN) -m results.publish

tutorials: $(WAN)        ## execute every notebook from scratch, store its outputs, check them (some ten minutes)
	$(RUN) tutorials/execute.py
	$(RUN) tutorials/execute.py --check

publish: $(WAN)          ## copy measured numbers and pictures to results/ and set the pages' tables from them
	$(RUN) -m results.publish

lint: $(STAMP)
	$(RUN) -m ruff check .

$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

$(WAN): $(STAMP) wan_scale/requirements.txt
	$(RUN) -m pip install -q -r wan_scale/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
