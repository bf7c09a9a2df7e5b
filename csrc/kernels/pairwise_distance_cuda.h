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

struct DistanceGradient {  // elements of the distances' type, of row i and column j at i · strides[0] + j · strides[1]
  const void *dist, *grad;  // (n, m); dist for the Euclidean distance alone
  int64_t dist_strides[2], grad_strides[2];
};

// The gradient with respect to x, to pairs.out (n, d), of the rows' type; scratch: (n + m + n · d) for the cosine. One
// launch, three for the cosine.
cudaError_t pairwise_distance_gradient(const Pairs& pairs, const DistanceGradient& of, cudaStream_t stream);

}  // namespace mgn
