# Two commands: `make quickstart` and `make test`. Each sets up first what is missing.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
JOB ?= jobs/quickstart.yaml
PORT ?= 8000
export VENV

.PHONY: help setup quickstart test test-all lint format bench bench-judge bench-audit bench-derived bench-probes bench-monitors bench-change bench-forgetting bench-staleness bench-scale gpu-check judge-server data-llmbar data-pandalm clean

help: ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP) ## the virtual environment, torch, vLLM, the embedded model

# Again whenever the requirements or the script change; in seconds when nothing is missing.
$(STAMP): pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

quickstart: $(STAMP) ## sets up, then runs jobs/quickstart.yaml (or JOB=...)
	@$(BIN)/rlaif run $(JOB)

# Python may keep the bytecode of the tests and of what they start, whatever the environment says: half the collection.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test: $(STAMP) ## sets up, then runs the test suite (ARGS="-m 'not slow'" for the quick part, ARGS=-n0 in one process)
	@$(PYTEST) $(ARGS)

test-all: $(STAMP) ## the test suite with what is marked `nightly`
	@$(PYTEST) -m "" $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy rlaif benchmarks

format: $(STAMP) ## puts the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## speed of the loop beside TRL's trainer and two limits
	@$(BIN)/python -m benchmarks.loop $(ARGS)

bench-judge: $(STAMP) ## speed of a judge behind a server, of parsing and verdicts, and its memory
	@$(BIN)/python -m benchmarks.judge $(ARGS)
	@$(BIN)/python -m benchmarks.judge_verdicts

bench-audit: $(STAMP) ## speed and memory of the audit on a run of a million votes
	@$(BIN)/python -m benchmarks.audit $(ARGS)

bench-derived: $(STAMP) ## how good contrasts derived from rules are (ARGS="--sets derived.2")
	@$(BIN)/python -m benchmarks.derived $(ARGS)

bench-probes: $(STAMP) ## which probes a base policy passes, and the fixed texts' perplexity in two ways (docs/forgetting.md)
	@$(BIN)/python -m benchmarks.probes $(ARGS)

bench-monitors: $(STAMP) ## how often monitors cry wolf, and how soon they tell what is wrong, simulated
	@$(BIN)/python -m benchmarks.monitors $(ARGS)

bench-change: $(STAMP) ## what it is worth to go on online when the rules change; three hours a seed (docs/change.md)
	@$(BIN)/python -m benchmarks.change $(ARGS)

bench-forgetting: $(STAMP) ## what holds forgetting down, four variants of a job; hours (docs/forgetting.md)
	@$(BIN)/python -m benchmarks.variants forgetting $(ARGS)

bench-staleness: $(STAMP) ## what it costs in learning to sample from an older policy; hours (docs/scale.md)
	@$(BIN)/python -m benchmarks.variants staleness $(ARGS)

bench-scale: $(STAMP) ## what streams, overlap and replicas bring, and what the loop itself costs; half an hour (docs/scale.md)
	@$(BIN)/python -m benchmarks.scale $(ARGS)

gpu-check: $(STAMP) ## do learner, judge and hand-over compute on a GPU what they compute on the CPU? (no network)
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

judge-server: $(STAMP) ## vLLM's OpenAI-compatible server with the embedded model, on loopback (PORT=8000)
	@VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING $(BIN)/python -m vllm.entrypoints.openai.api_server \
		--model "$$($(BIN)/rlaif models embedded:smollm2-135m-instruct)" --served-model-name smollm2 \
		--dtype "$$($(BIN)/python -m rlaif.hardware)" \
		--host 127.0.0.1 --port $(PORT) --max-model-len 2048 --enforce-eager

data-llmbar: $(STAMP) ## LLMBar's pairs and recorded verdicts, from GitHub into data/: figures in docs/trust.md, some tests
	@$(BIN)/python scripts/public_data.py llmbar

data-pandalm: $(STAMP) ## PandaLM's pairs and verdicts, from GitHub into data/: some tests
	@$(BIN)/python scripts/public_data.py pandalm

clean: ## removes the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .setup.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
