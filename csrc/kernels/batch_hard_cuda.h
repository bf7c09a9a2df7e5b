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

// How mining is shared out among blocks; it changes no bit of the result.
struct MiningPlan {
  int anchors;            // of a block: 16 or 64
  int64_t tiles, parts;   // blocks for a head's anchors, and blocks that share the candidates of each of these
  int64_t scratch_bytes;
};
// For a device of so many multiprocessors; anchors and parts are chosen where they are 0.
MiningPlan plan_mining(const BatchHard& mining, int multiprocessors, int anchors = 0, int64_t parts = 0);

// One launch each, whose result is returned. scratch: plan.scratch_bytes, aligned to 16.
cudaError_t batch_hard_forward(const BatchHard& mining, const int64_t* labels, const int64_t* candidate_labels,
                               const TripletLoss& triplet, const MiningPlan& plan, void* scratch, cudaStream_t stream);
cudaError_t batch_hard_backward(const BatchHard& mining, const MinedGradient& gradient, cudaStream_t stream);

// Whether this build has code for the current device.
cudaError_t batch_hard_loads();

}  // namespace mgn
