// Retrieval ranks on CUDA.
//
// Canonical sums: sixteen lanes take a pair, a partial sum each. Counting: a block takes a query and reads its row of
// products once. Items above a level by more than the filter may err are counted in shared memory. Items within that
// margin go on a list, those of a span at once, and a second kernel decides them by their keys.
#include "basics_cuda.cuh"
#include "ranking_cuda.h"

namespace mgn {
namespace {

constexpr int kThreads = 256;
constexpr int kSpan = 2048;            // products of a row at a time
constexpr int kLevels = 1024;          // of a query, counted in shared memory; those of more matches in global memory
constexpr int kPairs = kThreads / 16;  // of a block

enum class Term { product, squared_difference };

// Element i goes to sum i mod 16, ascending; then sum j takes j + 8, j + 4, j + 2, j + 1. All 16 lanes get the sum.
template <Term term> __device__ double canonical_sum(const float* x, const float* y, int64_t d) {
  double sum = 0;
  for (int64_t k = threadIdx.x % 16; k < d; k += 16) {
    const double a = x[k], b = y[k];
    if (term == Term::product)
      sum += a * b;  // exact, so it may be fused
    else
      sum = __dadd_rn(sum, __dmul_rn(a - b, a - b));
  }
  for (int distance = 8; distance; distance /= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
  return sum;
}

__device__ double key_of(const float* x, const float* y, int64_t d, bool cosine, double norm_x, double norm_y) {
  if (!cosine) return canonical_sum<Term::squared_difference>(x, y, d);
  const double dot = canonical_sum<Term::product>(x, y, d);
  return norm_x * norm_y > 0 ? -(dot / (norm_x * norm_y)) : 0;
}

struct Norms {
  Rows rows;
  double* norms;
};
__global__ void __launch_bounds__(kThreads) measure_norms(Norms n) {
  const int64_t i = int64_t(blockIdx.x) * kPairs + threadIdx.x / 16;
  const float* row = n.rows[i < n.rows.count ? i : n.rows.count - 1];
  const double norm = sqrt(canonical_sum<Term::product>(row, row, n.rows.d));
  if (i < n.rows.count && threadIdx.x % 16 == 0) n.norms[i] = norm;
}

struct Round {
  Rows rows;
  const double* norms;
  float* rounded;
  double* residual;
};
__global__ void __launch_bounds__(kThreads) round_rows(Round r) {
  const int64_t i = int64_t(blockIdx.x) * kPairs + threadIdx.x / 16, d = r.rows.d;
  const float* row = r.rows[i < r.rows.count ? i : r.rows.count - 1];
  double squares = 0;
  for (int64_t k = threadIdx.x % 16; k < d; k += 16) {
    const float x = row[k], rounded = __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu);
    if (i < r.rows.count) r.rounded[i * d + k] = rounded;
    const double lost = x - rounded;  // exact in float32
    squares += lost * lost;
  }
  for (int distance = 8; distance; distance /= 2) squares += __shfl_xor_sync(kWarp, squares, distance);
  if (i < r.rows.count && threadIdx.x % 16 == 0) r.residual[i] = sqrt(squares) / r.norms[i];
}

struct Pairs {
  Rows query, gallery;
  const int64_t *queries, *items;
  int64_t count;
  bool cosine;
  double* keys;
};
__global__ void __launch_bounds__(kThreads) measure_keys(Pairs p) {
  const int64_t i = int64_t(blockIdx.x) * kPairs + threadIdx.x / 16, at = i < p.count ? i : p.count - 1, d = p.query.d;
  const float *x = p.query[p.queries[at]], *y = p.gallery[p.items[at]];
  double norm_x = 0, norm_y = 0;
  if (p.cosine)
    norm_x = sqrt(canonical_sum<Term::product>(x, x, d)), norm_y = sqrt(canonical_sum<Term::product>(y, y, d));
  const double key = key_of(x, y, d, p.cosine, norm_x, norm_y);
  if (i < p.count && threadIdx.x % 16 == 0) p.keys[i] = key;
}

struct Count {
  Tile tile;
  Filter filter;
  Matches matches;
  Excluded excluded;
  Scratch scratch;
  int64_t* redecided;

  __device__ float similarity(int64_t q, int64_t j) const {
    return __fmaf_rn(filter.dots[q * filter.stride + j], filter.item_scale[j], filter.item_shift[j]);
  }
  __device__ void add(int64_t match, int64_t count) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(matches.steps + match), static_cast<unsigned long long>(count));
  }
};

__device__ int64_t lower_bound(const int64_t* from, int64_t n, int64_t value) {
  int64_t low = 0;
  for (int64_t high = n; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (from[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) count(Count c) {
  __shared__ bool skipped[kSpan];
  __shared__ int steps[kLevels];
  __shared__ int open[kSpan];
  __shared__ int open_count, place;
  const int64_t q = blockIdx.x, begin = c.matches.offsets[q], m = c.matches.offsets[q + 1] - begin,
                items = c.tile.gallery.count;
  if (m == 0) return;
  float *low = c.scratch.low + begin, *high = c.scratch.high + begin;
  const auto level = [&](int64_t i) {
    return c.filter.level_scale[q] * c.matches.keys[begin + i] + c.filter.level_shift[q];
  };
  // The levels' own rounding is added. One margin serves all levels, so that their ends descend as they do.
  const double margin = c.filter.error[q] + fmax(fabs(level(0)), fabs(level(m - 1))) * 0x1p-50;
  for (int64_t i = threadIdx.x; i < m; i += kThreads) {
    low[i] = isfinite(margin) ? __double2float_rd(level(i) - margin) : -infinity<float>();
    high[i] = isfinite(margin) ? __double2float_ru(level(i) + margin) : infinity<float>();
  }
  for (int i = threadIdx.x; i < kLevels; i += kThreads) steps[i] = 0;

  for (int64_t from = 0; from < items; from += kSpan) {
    for (int j = threadIdx.x; j < kSpan; j += kThreads) skipped[j] = false;  // what this thread alone has counted
    __syncthreads();  // the open items of the span before are on the list
    if (threadIdx.x == 0) open_count = 0;
    const int64_t first = c.tile.first + from, end = first + kSpan;
    for (int list = 0; list < 2; ++list) {
      const int64_t* excluded = list ? c.excluded.junk : c.excluded.order + c.excluded.begin[q];
      const int64_t n = list ? c.excluded.junk_count : c.excluded.end[q] - c.excluded.begin[q];
      for (int64_t i = lower_bound(excluded, n, first) + threadIdx.x; i < n && excluded[i] < end; i += kThreads)
        skipped[excluded[i] - first] = true;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < kSpan && from + j < items; j += kThreads) {
      const float similarity = c.similarity(q, from + j);
      if (skipped[j] || similarity < low[m - 1]) continue;
      const int64_t above = first_below(high, m, similarity);
      if (above < m && m <= kLevels) atomicAdd(steps + above, 1);
      if (above < m && m > kLevels) c.add(begin + above, 1);
      if (first_reached(low, m, similarity) < above) open[atomicAdd(&open_count, 1)] = j;
    }
    __syncthreads();
    if (threadIdx.x == 0) place = atomicAdd(c.scratch.open_count, open_count);
    __syncthreads();
    for (int i = threadIdx.x; i < open_count; i += kThreads) c.scratch.open[place + i] = q * items + from + open[i];
  }
  for (int64_t i = threadIdx.x; i < m && m <= kLevels; i += kThreads)
    if (steps[i]) c.add(begin + i, steps[i]);
}

// Works the list off. An open item was counted from the first level that it is above; its key may move it earlier.
__global__ void __launch_bounds__(kThreads) decide(Count c) {
  const int64_t open = *c.scratch.open_count, items = c.tile.gallery.count;
  if (blockIdx.x == 0 && threadIdx.x == 0) *c.redecided += open;
  for (int64_t from = int64_t(blockIdx.x) * kPairs; from < open; from += int64_t(gridDim.x) * kPairs) {
    const int64_t i = from + threadIdx.x / 16, entry = c.scratch.open[i < open ? i : open - 1];
    const int64_t q = entry / items, j = entry % items, begin = c.matches.offsets[q],
                  m = c.matches.offsets[q + 1] - begin;
    const double norm_x = c.tile.cosine ? c.tile.query_norms[q] : 0,
                 norm_y = c.tile.cosine ? c.tile.gallery_norms[j] : 0;
    const double key = key_of(c.tile.query[q], c.tile.gallery[j], c.tile.query.d, c.tile.cosine, norm_x, norm_y);
    if (i >= open || threadIdx.x % 16) continue;
    const float similarity = c.similarity(q, j);
    const int64_t above = first_below(c.scratch.high + begin, m, similarity);
    const int64_t reached = first_reached(c.scratch.low + begin, m, similarity);
    const int64_t level = first_behind(c.matches, begin + reached, begin + above, key, c.tile.first + j);
    if (level == begin + above) continue;
    c.add(level, 1);
    if (above < m) c.add(begin + above, -1);
  }
}

}  // namespace

cudaError_t canonical_norms(const Rows& rows, double* norms, cudaStream_t stream) {
  return launch<Norms>(measure_norms, (rows.count + kPairs - 1) / kPairs, kThreads, stream, {rows, norms});
}

cudaError_t round_to_tf32(const Rows& rows, const double* norms, float* rounded, double* residual,
                          cudaStream_t stream) {
  return launch<Round>(round_rows, (rows.count + kPairs - 1) / kPairs, kThreads, stream,
                       {rows, norms, rounded, residual});
}

cudaError_t canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items,
                           int64_t pairs, bool cosine, double* keys, cudaStream_t stream) {
  return launch<Pairs>(measure_keys, (pairs + kPairs - 1) / kPairs, kThreads, stream,
                       {query, gallery, queries, items, pairs, cosine, keys});
}

cudaError_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded,
                             const Scratch& scratch, int64_t* redecided, cudaStream_t stream) {
  const Count c = {tile, filter, matches, excluded, scratch, redecided};
  if (tile.query.count == 0 || tile.gallery.count == 0) return cudaSuccess;
  if (const cudaError_t error = cudaMemsetAsync(scratch.open_count, 0, sizeof(int), stream)) return error;
  if (const cudaError_t error = launch<Count>(count, tile.query.count, kThreads, stream, c)) return error;
  constexpr int64_t kMost = 2048;  // blocks; each takes more pairs when it is done
  const int64_t blocks = (tile.query.count * tile.gallery.count + kPairs - 1) / kPairs;
  return launch<Count>(decide, blocks < kMost ? blocks : kMost, kThreads, stream, c);
}

}  // namespace mgn
