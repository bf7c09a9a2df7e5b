// Batch-hard mining on CUDA. No torch header: device pointers, sizes and a stream.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "feature_type_cuda.h"

namespace mgn {

struct BatchHard {  // every pointer is on the device; all is contiguous
  FeatureType type;
  int64_t heads, n, m, d;
  bool own;                    // the anchors are their own candidates: one array, one list of labels, one gradient
  const void* anchors;         // (heads, n, d)
  const void* candidates;      // (heads, m, d)
  void *dist_ap, *dist_an;     // (heads, n) float32, or float64 for float64 features
  int64_t *pos_idx, *neg_idx;  // (heads, n)
};

struct TripletLoss {  // left out where loss is null
  void* loss;         // (heads)
  void* slope;        // (heads, n): ∂loss/∂dist_ap = −∂loss/∂dist_an
  int* finished;      // (heads) scratch
  bool soft;          // log(1 + exp(ap − an)) instead of max(0, ap − an + margin)
  double margin;
};

struct MinedGradient {
  const void *grad_ap, *grad_an;  // (heads, n); or, with a slope, grad_ap (heads) of the loss alone
  const void* slope;              // (heads, n), or null
  // Which pairs a candidate is part of: entry e < n stands for anchor e and its positive, n + e for e and its negative.
  // entries (heads, 2n) sorted by candidate, those of candidate j at offsets[j] … offsets[j + 1] of (heads, m + 1).
  // Both null: every warp looks through the indices itself, which is faster for the batches of one GPU's training.
  const int64_t *entries, *offsets;
  void* grad_anchors;     // (heads, n, d)
  void* grad_candidates;  // (heads, m, d); not written where the anchors are their own candidates
};

// One launch each, whose result is returned. anchors_per_block: 16, 64, or 0 to choose by the number of anchors.
cudaError_t batch_hard_forward(const BatchHard& mining, const int64_t* labels, const int64_t* candidate_labels,
                               const TripletLoss& triplet, int anchors_per_block, cudaStream_t stream);
cudaError_t batch_hard_backward(const BatchHard& mining, const MinedGradient& gradient, cudaStream_t stream);

// Whether this build has code for the current device.
cudaError_t batch_hard_loads();

}  // namespace mgn
