// Batch-hard mining on CUDA, backward: one launch, whatever the size.
//
// A warp owns 128 columns of one row of a gradient and gathers, in a fixed order, the mined pairs that the row is part
// of. No atomics on floating point: the same input gives the same bits.
#include "basics_cuda.cuh"
#include "batch_hard_cuda.h"

namespace mgn {
namespace {

template <typename T> struct Backward {
  int64_t heads, n, m, d;
  bool own;
  const T *anchors, *candidates;
  const Wide<T>*dist_ap, *dist_an;
  const int64_t *pos_idx, *neg_idx;
  const Wide<T>*grad_ap, *grad_an, *slope;
  const int64_t *entries, *offsets;
  T *grad_anchors, *grad_candidates;
};

constexpr int kWarps = 4;  // of a block
constexpr int kColumnsPerLane = 4, kColumnsPerWarp = 32 * kColumnsPerLane;

// One warp's 128 columns of one row of the gradient.
template <typename T> struct Gathered {
  using C = Wide<T>;
  const Backward<T>& b;
  int64_t head, from;
  C sum[kColumnsPerLane] = {};

  // The mined pair of anchor i adds its pull on the anchor (side +1), or on its partner (side −1).
  __device__ void add(int64_t i, bool positive, C side) {
    const int64_t at = head * b.n + i, partner = (positive ? b.pos_idx : b.neg_idx)[at];
    const C dist = (positive ? b.dist_ap : b.dist_an)[at];
    const C grad = b.slope ? (positive ? b.grad_ap[head] : -b.grad_ap[head]) * b.slope[at]
                           : (positive ? b.grad_ap : b.grad_an)[at];
    if (isnan(dist)) {  // it has no partner, and its gradient is NaN
#pragma unroll
      for (int c = 0; c < kColumnsPerLane; ++c) sum[c] = dist;
    }
    if (partner < 0 || partner >= b.m || dist == 0 || grad == 0) return;  // at distance 0 the gradient is 0
    const T *x = b.anchors + at * b.d, *y = b.candidates + (head * b.m + partner) * b.d;
#pragma unroll
    for (int c = 0; c < kColumnsPerLane; ++c) {
      const int64_t k = from + c * 32 + threadIdx.x % 32;
      if (k < b.d) sum[c] += side * ((widen(x[k]) - widen(y[k])) / dist * grad);
    }
  }
};

template <typename T> __global__ void __launch_bounds__(32 * kWarps, 6) gather(Backward<T> b) {
  const int lane = threadIdx.x % 32;
  const int64_t slices = (b.d + kColumnsPerWarp - 1) / kColumnsPerWarp, rows = b.own ? b.n : b.n + b.m;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (warp >= b.heads * rows * slices) return;
  const int64_t head = warp / (rows * slices), row = warp / slices % rows, from = warp % slices * kColumnsPerWarp;
  const bool anchor = row < b.n, candidate = b.own || !anchor;
  const int64_t j = b.own ? row : row - b.n;

  Gathered<T> gathered{b, head, from};
  if (anchor) {
    gathered.add(row, true, 1);
    gathered.add(row, false, 1);
  }
  if (candidate && b.entries) {
    const int64_t* offsets = b.offsets + head * (b.m + 1) + j;
    for (int64_t e = offsets[0]; e < offsets[1]; ++e) {
      const int64_t entry = b.entries[head * 2 * b.n + e];
      gathered.add(entry % b.n, entry < b.n, -1);
    }
  } else if (candidate) {
    for (int64_t first = 0; first < 2 * b.n; first += 32) {
      const int64_t entry = first + lane;
      bool mine = false;
      if (entry < 2 * b.n)
        mine = (entry < b.n ? b.pos_idx[head * b.n + entry] : b.neg_idx[head * b.n + entry - b.n]) == j;
      for (unsigned matching = __ballot_sync(kWarp, mine); matching; matching &= matching - 1) {
        const int64_t pair = first + __ffs(matching) - 1;
        gathered.add(pair % b.n, pair < b.n, -1);
      }
    }
  }
  T* out = anchor ? b.grad_anchors + (head * b.n + row) * b.d : b.grad_candidates + (head * b.m + j) * b.d;
#pragma unroll
  for (int c = 0; c < kColumnsPerLane; ++c) {
    const int64_t k = from + c * 32 + lane;
    if (k < b.d) out[k] = narrow<T>(gathered.sum[c]);
  }
}

template <typename T> cudaError_t backward(const BatchHard& x, const MinedGradient& g, cudaStream_t stream) {
  using C = Wide<T>;
  const Backward<T> b = {x.heads, x.n, x.m, x.d, x.own, static_cast<const T*>(x.anchors),
                         static_cast<const T*>(x.candidates), static_cast<const C*>(x.dist_ap),
                         static_cast<const C*>(x.dist_an), x.pos_idx, x.neg_idx, static_cast<const C*>(g.grad_ap),
                         static_cast<const C*>(g.grad_an), static_cast<const C*>(g.slope), g.entries, g.offsets,
                         static_cast<T*>(g.grad_anchors), static_cast<T*>(g.grad_candidates)};
  const int64_t rows = x.own ? x.n : x.n + x.m;
  const int64_t warps = x.heads * rows * ((x.d + kColumnsPerWarp - 1) / kColumnsPerWarp);
  return launch(gather<T>, (warps + kWarps - 1) / kWarps, 32 * kWarps, stream, b);
}

}  // namespace

cudaError_t batch_hard_backward(const BatchHard& x, const MinedGradient& gradient, cudaStream_t stream) {
  return with_type(x.type, [&](auto element) { return backward<decltype(element)>(x, gradient, stream); });
}

cudaError_t batch_hard_loads() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, gather<float>);
}

}  // namespace mgn
