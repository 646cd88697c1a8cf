.DEFAULT_GOAL := help
.PHONY: help test coverage bench lint format

CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

help:      ## list the targets
	@grep -E '^[a-z]+: ' $(MAKEFILE_LIST) | sed 's/: *##/\t/' | expand -t 10

test:      ## quick tests
	pytest

coverage:  ## quick tests, and which lines of efreg/ they miss
	pytest --cov

bench:     ## benchmarks, one CSV row a figure
	pytest bench --benchmark-only

lint:      ## what CI checks beside the tests
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

format:    ## mend what can be mended by machine
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)
