.PHONY: build test long sanitize gpu peers bench

build:       # again, after an edit in csrc/: an editable install does not see it
	pip install -q 'setuptools>=77' ninja
	pip install --no-build-isolation -e .

test:        # what CI runs
	pytest

long:        # every test, twenty times the random cases, the operations on two threads
	MGN_TIMES=10 OMP_NUM_THREADS=2 pytest -m '' -rs tests/ops
	MGN_TIMES=10 pytest -m '' -rs --ignore=tests/ops

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize:    # the CPU operations under AddressSanitizer and UndefinedBehaviorSanitizer, built in a copy of this folder
	rm -rf build/sanitize && mkdir -p build/sanitize
	tar c --exclude='*.so' benchmarks csrc gin mgn tests pyproject.toml setup.py README.md LICENSE | tar x -C build/sanitize
	cd build/sanitize && MGN_CUDA=0 CFLAGS='$(SANITIZERS)' LDFLAGS='$(SANITIZERS)' python setup.py build_ext --inplace
	cd build/sanitize && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  pytest -n 0 --ignore-glob='*_cuda*.py' --ignore-glob='*_kernel*.py' --ignore=tests/ops/test_native.py \
	  --ignore=tests/ops/test_mutants.py --ignore=tests/ops/test_banks.py \
	  -k 'not memory_stays and not all_at_once and not need_no and not needs_no' tests/ops

gpu:         # on a machine with a GPU: build, GPU tests, compute-sanitizer, times; STEPS='…' for some of them
	python -m benchmarks.gpu $(STEPS)

peers:       # what the benchmarks compare with; without their dependencies, which pin a torch of 2022
	pip install --no-deps fastreid torchreid
	pip install pytorch-metric-learning cython faiss-cpu yacs termcolor

bench:       # speeds beside those of named peers, on this machine
	python -m benchmarks.loading
	python -m benchmarks.convolutions
	python -m benchmarks.triplet
	python -m benchmarks.ranking
	python -m benchmarks.neighbours
	python -m benchmarks.training
