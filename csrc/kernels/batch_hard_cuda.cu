// Batch-hard mining on CUDA, forward: one launch, whatever the size.
//
// A block owns 16 or 64 anchors of a head and passes over candidates, 64 at a time, as a matrix product would: slices
// of both in shared memory, a register tile a thread. It sums (x − y)² where a product sums x·y, so nothing cancels
// between near duplicates and nothing has to be measured again. Then it mines the tile in registers; the distances
// never reach memory. Where there are too few anchors for every multiprocessor, the candidates are split among several
// blocks, and the last of them to finish puts their results together; no split changes a bit. It settles the anchors,
// a warp each: measures the selected pairs in double, and selects again in double where squares left the range of
// their type. The last block of a head to finish sums that head's loss in a fixed order.
#include "batch_hard_cuda.h"

#include "squares_cuda.cuh"

namespace mgn {
namespace {

enum : unsigned { kPositiveOutOfRange = 1, kNegativeTiny = 2, kNegativeOutOfRange = 4 };

// The hardest pairs so far, by squared distance; the lower index wins a tie. Index −1: none yet.
template <typename C> struct Best {
  C ap, an;
  int pos, neg;
  unsigned flags;

  static __device__ Best none() { return {C(-1), infinity<C>(), -1, -1, 0}; }

  __device__ void offer(C dist2, int j, bool positive) {  // j ascending
    const bool in_range = dist2 < infinity<C>();          // and no NaN
    if (positive) {
      if (!in_range) flags |= kPositiveOutOfRange;
      if (dist2 > ap) ap = dist2, pos = j;
    } else {
      if (!in_range) flags |= kNegativeOutOfRange;
      if (dist2 < an) an = dist2, neg = j;
    }
  }

  __device__ void merge(const Best& other) {
    // As an unsigned number, −1 (no index) is the largest.
    if (other.ap > ap || (other.ap == ap && unsigned(other.pos) < unsigned(pos))) ap = other.ap, pos = other.pos;
    if (other.an < an || (other.an == an && unsigned(other.neg) < unsigned(neg))) an = other.an, neg = other.neg;
    flags |= other.flags;
  }
  __device__ void merge_lane(int distance) {
    merge({__shfl_xor_sync(kWarp, ap, distance), __shfl_xor_sync(kWarp, an, distance),
           __shfl_xor_sync(kWarp, pos, distance), __shfl_xor_sync(kWarp, neg, distance),
           __shfl_xor_sync(kWarp, flags, distance)});
  }
};

template <typename T> __device__ bool warp_finds_all_finite(const T* row, int64_t d) {
  bool finite = true;
  for (int64_t k = threadIdx.x % 32; k < d; k += 32) finite &= bool(isfinite(widen(row[k])));
  return __all_sync(kWarp, finite);
}

// Euclidean distance by one warp; NaN where an element is not finite.
template <typename T> __device__ double warp_distance(const T* x, const T* y, int64_t d) {
  return warp_norm(d, [&](int64_t k) {
    const double a = widen(x[k]), b = widen(y[k]);
    return isfinite(a) && isfinite(b) ? a - b : nan("");
  });
}

template <typename T> struct Forward {
  int64_t n, m, d;
  const T *anchors, *candidates;
  const int64_t *labels, *candidate_labels;
  Wide<T>*dist_ap, *dist_an;
  int64_t *pos_idx, *neg_idx;
  Wide<T>*loss, *slope;
  bool soft;
  double margin;
  int64_t tiles, parts;    // of a head's anchors, and of its candidates
  int *finished, *arrived; // how many blocks have, of each head and of each tile
  Best<Wide<T>>* partial;  // (heads, tiles, parts, anchors of a block)
};

// Whether this block is the last of `blocks` to come here. What the others wrote before is then to be seen. The whole
// block calls it; the barriers make one thread's fences count for all.
__device__ bool is_last(int* arrived, int64_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Measures the selected partner; selects again if the selection is in doubt. By one warp.
template <typename T>
__device__ void settle(const Forward<T>& f, int64_t head, int64_t i, bool positive, int partner, bool doubt,
                       Wide<T>* dist, int64_t* idx) {
  const T *anchor = f.anchors + (head * f.n + i) * f.d, *candidates = f.candidates + head * f.m * f.d;
  double best = positive ? -infinity<double>() : infinity<double>();
  if (!doubt) {
    if (partner >= 0) best = warp_distance(anchor, candidates + partner * f.d, f.d);
  } else {
    const int64_t label = f.labels[i];
    const int lane = threadIdx.x % 32;
    partner = -1;
    for (int64_t first = 0; first < f.m && !isnan(best); first += 32) {
      unsigned wanted =
          __ballot_sync(kWarp, first + lane < f.m && (f.candidate_labels[first + lane] == label) == positive);
      for (; wanted && !isnan(best); wanted &= wanted - 1) {
        const int64_t j = first + __ffs(wanted) - 1;
        const double here = warp_distance(anchor, candidates + j * f.d, f.d);
        if (isnan(here)) best = here, partner = -1;
        if (partner < 0 ? !isnan(here) : positive ? here > best : here < best) best = here, partner = int(j);
      }
    }
  }
  if (threadIdx.x % 32 == 0) {
    *dist = Wide<T>(best);
    *idx = partner;
  }
}

// loss and slope of a head from all its distances. One block, every thread.
template <typename T> __device__ void sum_loss(const Forward<T>& f, int64_t head) {
  using C = Wide<T>;
  __shared__ double sums[kThreads / 32];
  __shared__ int64_t counts[kThreads / 32];
  const volatile C *ap = f.dist_ap + head * f.n, *an = f.dist_an + head * f.n;  // volatile: other blocks wrote them
  const volatile int64_t *pos = f.pos_idx + head * f.n, *neg = f.neg_idx + head * f.n;
  C* slope = f.slope + head * f.n;
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < f.n; i += kThreads) {
    const double dist_ap = ap[i], dist_an = an[i];
    const bool pair = (pos[i] >= 0 && neg[i] >= 0) || isnan(dist_ap) || isnan(dist_an);
    const double gap = dist_ap - dist_an + (f.soft ? 0 : f.margin);
    // log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|); a NaN passes through both.
    double term = isnan(gap) ? gap : fmax(gap, 0.0), rise = isnan(gap) ? gap : gap > 0 ? 1 : 0;
    if (f.soft) term += log1p(exp(-fabs(gap))), rise = 1 / (1 + exp(-gap));
    if (pair) sum += term, ++count;
    slope[i] = pair ? C(rise) : C(0);
  }
  sum = sum_over_warp(sum);
  count = sum_over_warp(count);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum, counts[threadIdx.x / 32] = count;
  __syncthreads();
  sum = 0, count = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += sums[warp], count += counts[warp];
  const double share = 1.0 / double(count > 0 ? count : 1);
  if (threadIdx.x == 0) f.loss[head] = C(sum * share);
  for (int64_t i = threadIdx.x; i < f.n; i += kThreads) slope[i] *= C(share);
}

template <typename T, int kRowsPerThread>
__global__ void __launch_bounds__(kThreads, sizeof(Wide<T>) == 8 ? 1 : 2) mine(Forward<T> f) {
  using C = Wide<T>;
  constexpr int kRows = kSide * kRowsPerThread;
  __shared__ Best<C> selected[kRows];

  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t part = blockIdx.x % f.parts, tile = blockIdx.x / f.parts, head = tile / f.tiles,
                first = tile % f.tiles * kRows;
  const T *anchors = f.anchors + head * f.n * f.d, *candidates = f.candidates + head * f.m * f.d;

  Best<C> best[kRowsPerThread];
  int64_t labels[kRowsPerThread];
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int64_t i = first + ty * kRowsPerThread + r;
    labels[r] = i < f.n ? f.labels[i] : 0;
    best[r] = Best<C>::none();
  }

  for (int64_t column = part * kColumns; column < f.m; column += f.parts * kColumns) {
    C total[kRowsPerThread][kColumnsPerThread] = {};
    const auto as_it_is = [](int, C element) { return element; };
    sum_tile<T, kRowsPerThread>(anchors + first * f.d, f.n - first, candidates + column * f.d, f.m - column, int(f.d),
                                as_it_is, as_it_is, total);
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const int64_t j = column + column_of<C>(tx, c);
      if (j >= f.m) continue;
      const int64_t label = f.candidate_labels[j];
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) best[r].offer(total[r][c], int(j), labels[r] == label);
    }
  }

  Best<C>* const partial = f.partial + tile * f.parts * kRows;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    for (int distance = kSide / 2; distance; distance /= 2) best[r].merge_lane(distance);
    if (tx == 0) (f.parts > 1 ? partial + part * kRows : selected)[ty * kRowsPerThread + r] = best[r];
  }
  if (f.parts > 1) {
    if (!is_last(f.arrived + tile, f.parts)) return;
    if (threadIdx.x < kRows) {
      Best<C> merged = partial[threadIdx.x];
      for (int64_t p = 1; p < f.parts; ++p) merged.merge(partial[p * kRows + threadIdx.x]);
      selected[threadIdx.x] = merged;
    }
  }
  __syncthreads();

  for (int r = threadIdx.x / 32; r < kRows && first + r < f.n; r += kWarps) {
    const int64_t i = first + r, at = head * f.n + i;
    Best<C> winner = selected[r];
    if (winner.pos >= 0 && winner.ap < kTiny<C>) winner.flags |= kPositiveOutOfRange;
    if (winner.neg >= 0 && winner.an < kTiny<C>) winner.flags |= kNegativeTiny;
    if (!warp_finds_all_finite(anchors + i * f.d, f.d)) {
      if (threadIdx.x % 32 == 0) {
        f.dist_ap[at] = f.dist_an[at] = C(nan(""));
        f.pos_idx[at] = f.neg_idx[at] = -1;
      }
      continue;
    }
    settle(f, head, i, true, winner.pos, winner.flags & kPositiveOutOfRange, f.dist_ap + at, f.pos_idx + at);
    // A tiny sum leaves no doubt if the candidate is a duplicate: it is the first at distance 0.
    const bool duplicate =
        (winner.flags & kNegativeTiny) && warp_distance(anchors + i * f.d, candidates + winner.neg * f.d, f.d) == 0;
    settle(f, head, i, false, winner.neg,
           (winner.flags & kNegativeOutOfRange) || ((winner.flags & kNegativeTiny) && !duplicate), f.dist_an + at,
           f.neg_idx + at);
  }

  if (f.loss && is_last(f.finished + head, f.tiles)) sum_loss(f, head);
}

template <typename T>
cudaError_t forward(const BatchHard& x, const int64_t* labels, const int64_t* candidate_labels, const TripletLoss& t,
                    const MiningPlan& plan, void* scratch, cudaStream_t stream) {
  using C = Wide<T>;
  int* const finished = static_cast<int*>(scratch);
  const int64_t tiles = x.heads * plan.tiles, counters = x.heads + tiles;
  auto* const partial = reinterpret_cast<Best<C>*>(finished + (counters + 3) / 4 * 4);
  const Forward<T> f = {x.n, x.m, x.d, static_cast<const T*>(x.anchors), static_cast<const T*>(x.candidates), labels,
                        candidate_labels, static_cast<C*>(x.dist_ap), static_cast<C*>(x.dist_an), x.pos_idx, x.neg_idx,
                        static_cast<C*>(t.loss), static_cast<C*>(t.slope), t.soft, t.margin, plan.tiles, plan.parts,
                        finished, finished + x.heads, partial};
  if (t.loss || plan.parts > 1)
    if (const cudaError_t error = cudaMemsetAsync(finished, 0, counters * sizeof(int), stream)) return error;
  return launch(plan.anchors == 64 ? mine<T, 4> : mine<T, 1>, tiles * plan.parts, kThreads, stream, f);
}

}  // namespace

MiningPlan plan_mining(const BatchHard& x, int multiprocessors, int anchors, int64_t parts) {
  const auto ceiling = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  const int64_t columns = ceiling(x.m, kColumns), wanted = 2 * int64_t(multiprocessors);  // two blocks on each
  // 64 anchors at a time make better use of a multiprocessor, where there are so many, and work for every block.
  if (!anchors) anchors = x.n > 32 && x.heads * ceiling(x.n, 64) * columns >= wanted ? 64 : 16;
  const int64_t tiles = ceiling(x.n, anchors), blocks = x.heads * tiles;
  if (!parts && blocks && columns) parts = ceiling(columns, ceiling(columns, ceiling(wanted, blocks)));
  if (parts < 1) parts = 1;
  const int64_t entry = x.type == FeatureType::float64 ? sizeof(Best<double>) : sizeof(Best<float>);
  return {anchors, tiles, parts, (x.heads + blocks + 3) / 4 * 16 + (parts > 1 ? blocks * parts * anchors * entry : 0)};
}

cudaError_t batch_hard_forward(const BatchHard& x, const int64_t* labels, const int64_t* candidate_labels,
                               const TripletLoss& triplet, const MiningPlan& plan, void* scratch,
                               cudaStream_t stream) {
  if (x.d >= kMostDimensions) return cudaErrorInvalidValue;
  if (x.heads * x.n == 0)  // no anchors: losses of 0
    return triplet.loss ? cudaMemsetAsync(triplet.loss, 0, x.heads * (x.type == FeatureType::float64 ? 8 : 4), stream)
                        : cudaSuccess;
  return with_type(x.type, [&](auto element) {
    return forward<decltype(element)>(x, labels, candidate_labels, triplet, plan, scratch, stream);
  });
}

}  // namespace mgn
