// Distances of all pairs on CUDA. No torch header: device pointers, sizes and a stream.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "feature_type_cuda.h"
#include "pairwise_distance.h"

namespace mgn {

struct Pairs {  // every pointer is on the device; all is contiguous
  FeatureType type;
  Metric metric;
  int64_t n, m, d;
  const void *x, *y;  // (n, d), (m, d)
  void* out;          // (n, m) float32, or float64 for float64 rows
  double* scratch;    // (2 (n + m)) for the cosine; else not used
};

// One launch, two for the cosine; returns what they returned.
cudaError_t pairwise_distance(const Pairs& pairs, cudaStream_t stream);

}  // namespace mgn
