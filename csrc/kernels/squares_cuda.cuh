// Tiles of squared distances on CUDA, and exact distances by a warp: for batch-hard mining and pairwise distances.
#pragma once
#include "basics_cuda.cuh"

namespace mgn {
namespace {

constexpr int kThreads = 256, kSide = 16;  // a block is 16 × 16 threads
constexpr int kColumns = 64, kColumnsPerThread = kColumns / kSide;
constexpr int kDepth = 32;  // dimensions in shared memory; summed apart, then added: bounds the rounding

template <typename C> struct alignas(16) Four {  // read from shared memory in one instruction, or two
  C at[4];
};

// Squares outside (tiny, infinity) may have left the range of C.
template <typename C> constexpr C kTiny = C(sizeof(C) == 4 ? 0x1p-80 : 0x1p-900);

// √Σ difference(k)² in double by one warp, right in all of double's range; NaN and infinity as in the formula.
template <typename Difference> __device__ double warp_norm(int64_t d, Difference difference) {
  double sum = 0, largest = 0;
  for (int64_t k = threadIdx.x % 32; k < d; k += 32) {
    const double value = difference(k);
    sum += value * value;
    largest = fmax(largest, fabs(value));
  }
  sum = sum_over_warp(sum);
  if (!(sum <= 1e-280) && sum != infinity<double>()) return sqrt(sum);
  for (int distance = 16; distance; distance /= 2) largest = fmax(largest, __shfl_xor_sync(kWarp, largest, distance));
  if (largest == 0 || !isfinite(largest)) return largest;
  sum = 0;
  for (int64_t k = threadIdx.x % 32; k < d; k += 32) {
    const double ratio = difference(k) / largest;
    sum += ratio * ratio;
  }
  return largest * sqrt(sum_over_warp(sum));
}

// total[r][c] = ‖row r − column c‖² of this thread's share of a tile, by the whole block. x has `rows`, y `columns`
// rows. Elements beyond them count as 0. of_x(r, element) and of_y(c, element) return the element to use.
template <typename T, int kRowsPerThread, typename OfX, typename OfY>
__device__ void sum_tile(const T* x, int64_t rows, const T* y, int64_t columns, int64_t d, OfX of_x, OfY of_y,
                         Wide<T> (&total)[kRowsPerThread][kColumnsPerThread]) {
  using C = Wide<T>;
  constexpr int kRows = kSide * kRowsPerThread;
  // [dimension][row or column]; the pad spreads what one warp stores over the banks.
  __shared__ Four<C> y_slice[kDepth][kColumns / 4 + 1];
  __shared__ Four<C> x_slice[kDepth][kRows / 4 + 1];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t from = 0; from < d; from += kDepth) {
    __syncthreads();  // the last slice has been read
    const int k = threadIdx.x % kDepth;
    for (int r = threadIdx.x / kDepth; r < kRows; r += kThreads / kDepth)
      x_slice[k][r / 4].at[r % 4] = r < rows && from + k < d ? of_x(r, widen(x[r * d + from + k])) : C(0);
    for (int c = threadIdx.x / kDepth; c < kColumns; c += kThreads / kDepth)
      y_slice[k][c / 4].at[c % 4] = c < columns && from + k < d ? of_y(c, widen(y[c * d + from + k])) : C(0);
    __syncthreads();
    C sum[kRowsPerThread][kColumnsPerThread] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const Four<C> column = y_slice[depth][tx];
      C row[kRowsPerThread];
      if constexpr (kRowsPerThread == 4) {
        const Four<C> four = x_slice[depth][ty];
#pragma unroll
        for (int r = 0; r < 4; ++r) row[r] = four.at[r];
      } else {
        row[0] = x_slice[depth][ty / 4].at[ty % 4];
      }
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r)
#pragma unroll
        for (int c = 0; c < kColumnsPerThread; ++c) {
          const C difference = column.at[c] - row[r];
          sum[r][c] += difference * difference;
        }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r)
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) total[r][c] += sum[r][c];
  }
}

}  // namespace
}  // namespace mgn
