.PHONY: test bench

test:        # what CI runs
	pytest

bench:       # ratios against named peers, on this machine
	python -m benchmarks.loading
	python -m benchmarks.small_maps
