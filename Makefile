.PHONY: build test long gpu peers bench

build:       # again, after an edit in csrc/: an editable install does not see it
	pip install -q 'setuptools>=77' ninja
	pip install --no-build-isolation -e .

test:        # what CI runs
	pytest

long:        # every test, and twenty times the random cases
	MGN_TIMES=10 pytest -m ''

gpu:         # on a machine with a GPU: build, the whole suite, compute-sanitizer, benchmarks; prints a table to keep
	python -m benchmarks.gpu

peers:       # what the benchmarks compare with; without their dependencies, which pin a torch of 2022
	pip install --no-deps fastreid torchreid
	pip install pytorch-metric-learning cython faiss-cpu yacs termcolor

bench:       # speeds beside those of named peers, on this machine
	python -m benchmarks.loading
	python -m benchmarks.convolutions
	python -m benchmarks.triplet
	python -m benchmarks.ranking
	python -m benchmarks.neighbours
	python -m benchmarks.sharding
	python -m benchmarks.training
