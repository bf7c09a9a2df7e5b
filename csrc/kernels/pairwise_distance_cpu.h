// Distances of all pairs on the CPU. No torch header: plain pointers, and the caller brings the threads.
#pragma once
#include "basics_cpu.h"
#include "pairwise_distance.h"

namespace mgn {

// x: (n, d), y: (m, d) → out: (n, m), all row-major.
template <typename T>
void pairwise_distance(const T* x, const T* y, int64_t n, int64_t m, int64_t d, Metric metric, T* out,
                       int instruction_set, const Parallel& parallel);

}  // namespace mgn
