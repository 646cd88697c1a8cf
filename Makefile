.DEFAULT_GOAL := help
.PHONY: help test experiments coverage bench docs cuda-check lint format

CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

help:      ## list the targets
	@grep -E '^[a-z-]+: ' $(MAKEFILE_LIST) | sed 's/: *##/\t/' | expand -t 12

test:      ## quick tests
	pytest

experiments: ## quick tests of the laboratory, the examples and bench/paper, the reproduction
	pytest tests/lab tests/paper

coverage:  ## quick tests, and which lines of efreg/ they miss
	pytest --cov

bench:     ## benchmarks, one CSV row a figure
	pytest bench --benchmark-only

DOCS = docs/_build
docs:      ## the pages of docs/ as HTML in docs/_build; a warning is an error
	sphinx-build --fail-on-warning --keep-going --quiet docs $(DOCS)

cuda-check: ## compile and link the CUDA operations for sm_75, sm_80 and sm_90; needs nvcc, no GPU
	TORCH_EXTENSIONS_DIR=$$(mktemp -d) TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0" \
	    python -c "from efreg.backends import native; from efreg.kernels import launch; \
	        cuda = native.load(native.CUDA); print(cuda); \
	        assert (cuda.NARROW, cuda.WIDE, cuda.FLAT) == (launch.NARROW, launch.WIDE, launch.FLAT), 'tiles differ from kernels/launch.py'"

lint:      ## what CI checks beside the tests
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CXX_FILES)

format:    ## mend what can be mended by machine
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)
