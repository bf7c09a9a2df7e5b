// Gradients of pairwise distances on CUDA: one launch, three for the cosine, whatever the size.
//
// A thread owns one dimension of eight rows x and passes over all rows y. It sums differences, in double and in order:
// nothing cancels between near duplicates, and the same input gives the same bits. The weights of pairs are found once
// by a block, in shared memory. For the cosine the rows are unit vectors; what is summed is then projected.
#include "pairwise_distance_cuda.h"
#include "squares_cuda.cuh"

namespace mgn {
namespace {

constexpr int kRows = 8, kSpan = 64;  // rows x of a block, rows y at a time

template <typename T> struct Gradient {
  Metric metric;
  int64_t n, m, d;
  const T *x, *y;
  const Wide<T>*dist, *grad;
  int64_t dist_strides[2], grad_strides[2];
  T* out;
  double *norms, *pull;  // of the rows of x, then of y, and (n, d); null but for the cosine

  // What a pair pulls with, divided by its difference: ∂‖x − y‖ = (x − y) / ‖x − y‖, 0 at distance 0.
  __device__ double weight(int64_t i, int64_t j) const {
    const double upstream = grad[i * grad_strides[0] + j * grad_strides[1]];
    if (metric != Metric::euclidean) return metric == Metric::sqeuclidean ? 2 * upstream : upstream;
    const double distance = dist[i * dist_strides[0] + j * dist_strides[1]];
    return distance == 0 ? 0 : upstream / distance;
  }
};

__device__ double unit(double element, const double* norm) {
  return !norm ? element : *norm == 0 ? 0 : element / *norm;
}

template <typename T> __global__ void __launch_bounds__(kThreads) find_norms(Gradient<T> g) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= g.n + g.m) return;
  const T* x = row < g.n ? g.x + row * g.d : g.y + (row - g.n) * g.d;
  const double norm = warp_norm(g.d, [&](int64_t k) { return double(widen(x[k])); });
  if (threadIdx.x % 32 == 0) g.norms[row] = norm;
}

template <typename T> __global__ void __launch_bounds__(kThreads) sum_pulls(Gradient<T> g) {
  __shared__ double weights[kSpan][kRows];
  const int64_t across = (g.d + kThreads - 1) / kThreads, first = blockIdx.x / across * kRows,
                k = blockIdx.x % across * kThreads + threadIdx.x;
  double x[kRows], sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = first + r;
    x[r] = i < g.n && k < g.d ? unit(widen(g.x[i * g.d + k]), g.norms ? g.norms + i : nullptr) : 0;
  }
  for (int64_t from = 0; from < g.m; from += kSpan) {
    __syncthreads();  // the last weights have been read
    for (int e = threadIdx.x; e < kSpan * kRows; e += kThreads) {
      const int64_t i = first + e % kRows, j = from + e / kRows;
      weights[e / kRows][e % kRows] = i < g.n && j < g.m ? g.weight(i, j) : 0;
    }
    __syncthreads();
    const int64_t span = g.m - from < kSpan ? g.m - from : kSpan;
    if (k >= g.d) continue;
#pragma unroll 4
    for (int j = 0; j < span; ++j) {
      const double y = unit(widen(g.y[(from + j) * g.d + k]), g.norms ? g.norms + g.n + from + j : nullptr);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += weights[j][r] * (x[r] - y);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = (first + r) * g.d + k;
    if (first + r >= g.n || k >= g.d) continue;
    if (g.pull)
      g.pull[at] = sum[r];
    else
      g.out[at] = narrow<T>(Wide<T>(sum[r]));
  }
}

// The derivative of x/‖x‖: what is across x, divided by its norm; 0 of a zero vector. A warp takes a row.
template <typename T> __global__ void __launch_bounds__(kThreads) project(Gradient<T> g) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= g.n) return;
  const T* x = g.x + i * g.d;
  const double *pull = g.pull + i * g.d, norm = g.norms[i];
  double along = 0;
#pragma unroll 1  // the divisions of more at once take too many registers
  for (int64_t k = threadIdx.x % 32; k < g.d; k += 32) along += pull[k] * unit(widen(x[k]), &norm);
  along = sum_over_warp(along);
#pragma unroll 1
  for (int64_t k = threadIdx.x % 32; k < g.d; k += 32)
    g.out[i * g.d + k] = narrow<T>(Wide<T>(norm == 0 ? 0 : (pull[k] - along * unit(widen(x[k]), &norm)) / norm));
}

template <typename T> cudaError_t gradient(const Pairs& p, const DistanceGradient& of, cudaStream_t stream) {
  using C = Wide<T>;
  const bool cosine = p.metric == Metric::cosine;
  const Gradient<T> g = {p.metric, p.n, p.m, p.d, static_cast<const T*>(p.x), static_cast<const T*>(p.y),
                         static_cast<const C*>(of.dist), static_cast<const C*>(of.grad),
                         {of.dist_strides[0], of.dist_strides[1]}, {of.grad_strides[0], of.grad_strides[1]},
                         static_cast<T*>(p.out), cosine ? p.scratch : nullptr,
                         cosine ? p.scratch + p.n + p.m : nullptr};
  const auto blocks = [](int64_t rows) { return (rows + kWarps - 1) / kWarps; };
  if (cosine)
    if (const cudaError_t error = launch(find_norms<T>, blocks(p.n + p.m), kThreads, stream, g)) return error;
  const int64_t tiles = (p.n + kRows - 1) / kRows * ((p.d + kThreads - 1) / kThreads);
  const cudaError_t error = launch(sum_pulls<T>, tiles, kThreads, stream, g);
  return error || !cosine ? error : launch(project<T>, blocks(p.n), kThreads, stream, g);
}

}  // namespace

cudaError_t pairwise_distance_gradient(const Pairs& pairs, const DistanceGradient& of, cudaStream_t stream) {
  return with_type(pairs.type, [&](auto element) { return gradient<decltype(element)>(pairs, of, stream); });
}

}  // namespace mgn
