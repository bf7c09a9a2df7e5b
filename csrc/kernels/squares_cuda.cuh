// Tiles of squared distances on CUDA, and exact distances by a warp: for batch-hard mining and pairwise distances.
#pragma once
#include "basics_cuda.cuh"

namespace mgn {
namespace {

constexpr int kThreads = 256, kSide = 16, kWarps = kThreads / 32;  // a block is 16 × 16 threads
constexpr int kColumns = 64, kColumnsPerThread = kColumns / kSide;
constexpr int64_t kMostDimensions = 1 << 25;  // fewer: offsets in a tile of 64 rows are ints
constexpr int kDepth = 32;  // dimensions in shared memory; summed apart, then added: bounds the rounding

template <typename C> struct alignas(16) Packet {  // what one instruction reads from shared memory, or writes there
  static constexpr int kCount = 16 / sizeof(C);
  C at[kCount];
};

// The c-th column of thread tx. Neighbours read neighbouring packets, so that they read different banks.
template <typename C> __device__ int column_of(int tx, int c) {
  constexpr int kCount = Packet<C>::kCount;
  return c / kCount * kSide * kCount + tx * kCount + c % kCount;
}

// kDepth dimensions of kRows rows, on their way to shared memory: a warp has all dimensions of some packets of rows.
template <typename T, int kRows> struct Slice {
  static_assert(kDepth == 32, "a lane has one dimension");
  static constexpr int kCount = Packet<Wide<T>>::kCount, kPackets = kRows / kCount;
  static constexpr int kPerWarp = kPackets < kWarps ? 1 : kPackets / kWarps;
  // [dimension][packet]. An odd number of packets: eight lanes that store one beside each other use all banks.
  using Shared = Packet<Wide<T>>[kDepth][kPackets + 1];
  static_assert(kPackets % 2 == 0, "with the pad it is odd");
  T element[kPerWarp][kCount];

  // Calls with the packet, the place in it and the row; the last row stands for those beyond it.
  template <typename Call> static __device__ void each(int last, Call call) {
    const int warp = threadIdx.x / 32;
    if (kPackets < kWarps && warp >= kPackets) return;
#pragma unroll
    for (int p = 0; p < kPerWarp; ++p)
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int row = (p * kWarps + warp) * kCount + e;
        call(p, e, row < last ? row : last);
      }
  }

  // The next dimensions, those before x are done; those beyond the `left` that there are, are 0.
  __device__ void load(const T* x, int last, int d, int left) {
    const int k = threadIdx.x % 32;
    each(last, [&](int p, int e, int row) { element[p][e] = k < left ? x[row * d + k] : T(); });
  }
  template <typename Of> __device__ void store(Shared& slice, int last, Of of) const {
    Packet<Wide<T>> packet;
    each(last, [&](int p, int e, int row) {
      packet.at[e] = of(row, widen(element[p][e]));
      if (e == kCount - 1) slice[threadIdx.x % 32][p * kWarps + threadIdx.x / 32] = packet;
    });
  }
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
// rows, at least one; what is summed of rows beyond them means nothing. of_x(r, element) and of_y(c, element) return
// the element to use. While one slice is summed, the next is on its way.
template <typename T, int kRowsPerThread, typename OfX, typename OfY>
__device__ void sum_tile(const T* x, int64_t rows, const T* y, int64_t columns, int d, OfX of_x, OfY of_y,
                         Wide<T> (&total)[kRowsPerThread][kColumnsPerThread]) {
  using C = Wide<T>;
  constexpr int kRows = kSide * kRowsPerThread, kCount = Packet<C>::kCount;
  __shared__ typename Slice<T, kColumns>::Shared y_slice;
  __shared__ typename Slice<T, kRows>::Shared x_slice;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  int last_x = int(rows < kRows ? rows : kRows) - 1, last_y = int(columns < kColumns ? columns : kColumns) - 1;
  Slice<T, kColumns> next_y;
  Slice<T, kRows> next_x;
  next_y.load(y, last_y, d, d);
  next_x.load(x, last_x, d, d);
  for (int left = d; left > 0; left -= kDepth) {
    __syncthreads();  // the last slice has been read
    next_y.store(y_slice, last_y, of_y);
    next_x.store(x_slice, last_x, of_x);
    __syncthreads();
    // Offsets of rows are found again for each slice: to keep them would take too many registers.
    asm volatile("" : "+r"(last_x), "+r"(last_y));
    x += kDepth, y += kDepth;
    next_y.load(y, last_y, d, left - kDepth);
    next_x.load(x, last_x, d, left - kDepth);
    C sum[kRowsPerThread][kColumnsPerThread] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      C row[kRowsPerThread], column[kColumnsPerThread];
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; c += kCount) {
        const Packet<C> packet = y_slice[depth][column_of<C>(tx, c) / kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) column[c + e] = packet.at[e];
      }
      if constexpr (kRowsPerThread % kCount == 0) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; r += kCount) {
          const Packet<C> packet = x_slice[depth][(ty * kRowsPerThread + r) / kCount];
#pragma unroll
          for (int e = 0; e < kCount; ++e) row[r + e] = packet.at[e];
        }
      } else {
        row[0] = x_slice[depth][ty / kCount].at[ty % kCount];
      }
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r)
#pragma unroll
        for (int c = 0; c < kColumnsPerThread; ++c) {
          const C difference = column[c] - row[r];
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
