.PHONY: test long bench

test:        # what CI runs
	pytest

long:        # the short tests and those of minutes
	pytest -m "long or not long"

bench:       # ratios against named peers, on this machine
	python -m benchmarks.loading
	python -m benchmarks.small_maps
