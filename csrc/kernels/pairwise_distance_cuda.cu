// Distances of all pairs on CUDA: a block sums a tile of squared distances (squares_cuda.cuh) of rows or unit vectors.
//
// Pairs whose sums are too imprecise are measured again in double, by the warp that has them: sums that may have left
// the type's range, and for the cosine in float those below 1/64. There the rounding of unit vectors to float is a
// relative 2e-6, as pairwise_distance_cpu.cpp works out. Their length may be off as well, which all but cancels:
// (1 + ε) u − (1 + ε') v has a length of ‖u − v‖ up to a relative ε, and ε − ε' squared. With D/32 + 34 roundings of
// the sum, 1e-5 holds up to D = 3072.
#include "pairwise_distance_cuda.h"
#include "squares_cuda.cuh"

namespace mgn {
namespace {

struct Scale {  // x · first · second is x/‖x‖ in float, also where 1/‖x‖ leaves its range; x / norm the same in double
  float first, second;
  double norm;  // 1 of a zero vector
};

template <typename C> __device__ C scaled(C element, const Scale* scale) {
  if (!scale) return element;
  if constexpr (sizeof(C) == 8) return element / scale->norm;
  return element * scale->first * scale->second;
}

template <typename T> struct Tiles {
  Metric metric;
  int64_t n, m, d;
  const T *x, *y;
  Wide<T>* out;
  Scale* scales;  // of the rows of x, then of y; null but for the cosine
};

constexpr int kRowsPerThread = 4, kRows = kSide * kRowsPerThread;

template <typename T> __global__ void __launch_bounds__(kThreads) find_scales(Tiles<T> t) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= t.n + t.m) return;
  const T* x = row < t.n ? t.x + row * t.d : t.y + (row - t.n) * t.d;
  const double norm = warp_norm(t.d, [&](int64_t k) { return double(widen(x[k])); });
  int exponent = 0;
  if (isfinite(norm)) frexp(norm, &exponent);
  const double half = ldexp(1.0, -exponent / 2);
  if (threadIdx.x % 32 == 0)
    t.scales[row] = {float(half), norm == 0 ? 0 : float(1 / (norm * half)), norm == 0 ? 1 : norm};
}

template <typename V> __device__ V finished(V sum, Metric metric) {
  return metric == Metric::euclidean ? sqrt(sum) : metric == Metric::sqeuclidean ? sum : sum / 2;
}

template <typename T> __global__ void __launch_bounds__(kThreads, sizeof(Wide<T>) == 8 ? 1 : 2) measure(Tiles<T> t) {
  using C = Wide<T>;
  const int64_t across = (t.m + kColumns - 1) / kColumns, i0 = blockIdx.x / across * kRows,
                j0 = blockIdx.x % across * kColumns;
  const Scale *of_x = t.scales ? t.scales + i0 : nullptr, *of_y = t.scales ? t.scales + t.n + j0 : nullptr;
  C total[kRowsPerThread][kColumnsPerThread] = {};
  sum_tile<T, kRowsPerThread>(
      t.x + i0 * t.d, t.n - i0, t.y + j0 * t.d, t.m - j0, int(t.d),
      [&](int r, C element) { return scaled(element, of_x ? of_x + r : nullptr); },
      [&](int c, C element) { return scaled(element, of_y ? of_y + c : nullptr); }, total);

  const C low = !t.scales ? kTiny<C> : C(sizeof(C) == 4 ? 0x1p-6 : 0);
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  unsigned doubt = 0;  // a bit for each of the thread's pairs
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r)
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const int64_t i = i0 + ty * kRowsPerThread + r, j = j0 + column_of<C>(tx, c);
      if (i >= t.n || j >= t.m) continue;
      t.out[i * t.m + j] = finished(total[r][c], t.metric);
      if (total[r][c] < low || total[r][c] == infinity<C>())
        doubt |= 1u << (r * kColumnsPerThread + c);  // a NaN stays as it is
    }
  for (int pair = 0; pair < kRowsPerThread * kColumnsPerThread; ++pair)
    for (unsigned lanes = __ballot_sync(kWarp, doubt >> pair & 1); lanes; lanes &= lanes - 1) {
      const int thread = threadIdx.x / 32 * 32 + __ffs(lanes) - 1;
      const int r = thread / kSide * kRowsPerThread + pair / kColumnsPerThread,
                c = column_of<C>(thread % kSide, pair % kColumnsPerThread);
      const T *x = t.x + (i0 + r) * t.d, *y = t.y + (j0 + c) * t.d;
      const double a = of_x ? of_x[r].norm : 1, b = of_y ? of_y[c].norm : 1;
      const double dist = warp_norm(t.d, [&](int64_t k) { return widen(x[k]) / a - widen(y[k]) / b; });
      if (threadIdx.x == thread)
        t.out[(i0 + r) * t.m + j0 + c] = C(t.metric == Metric::euclidean ? dist : finished(dist * dist, t.metric));
    }
}

template <typename T> cudaError_t distances(const Pairs& p, cudaStream_t stream) {
  using C = Wide<T>;
  const Tiles<T> tiles = {p.metric, p.n, p.m, p.d, static_cast<const T*>(p.x), static_cast<const T*>(p.y),
                          static_cast<C*>(p.out),
                          p.metric == Metric::cosine ? reinterpret_cast<Scale*>(p.scratch) : nullptr};
  const int64_t blocks = (p.n + p.m + kWarps - 1) / kWarps;
  if (tiles.scales)
    if (const cudaError_t error = launch(find_scales<T>, blocks, kThreads, stream, tiles)) return error;
  return launch(measure<T>, ((p.n + kRows - 1) / kRows) * ((p.m + kColumns - 1) / kColumns), kThreads, stream, tiles);
}

}  // namespace

cudaError_t pairwise_distance(const Pairs& pairs, cudaStream_t stream) {
  if (pairs.d >= kMostDimensions) return cudaErrorInvalidValue;
  return with_type(pairs.type, [&](auto element) { return distances<decltype(element)>(pairs, stream); });
}

}  // namespace mgn
