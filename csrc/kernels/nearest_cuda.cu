// The smallest values of rows on CUDA: a block takes a query and reads its row of products once.
//
// What is below the largest of the `capacity` selected so far joins them in a buffer. When that could overflow, and at
// the end of the row, the smallest `capacity` of it are kept: found by eight bits at a time, most of them never. From
// the second tile on few values join; where none does, nothing is written. The order of the result depends on the
// atomics, its content does not: (value, item) pairs differ.
#include "basics_cuda.cuh"
#include "nearest_cuda.h"

namespace mgn {
namespace {

constexpr int kThreads = 256, kPerThread = 4;
constexpr int kSpan = kThreads * kPerThread;  // products at a time
constexpr int kBuffer = 3 * kSpan;            // of a query, in shared memory; a larger one in global memory
constexpr int kDigits = 256;                  // of eight bits

using Packed = unsigned long long;

// A value and its item as one unsigned number, in the order of (value, item); −0 equals 0.
__device__ Packed pack(float value, int64_t item) {
  const unsigned bits = __float_as_uint(value + 0.f);
  return Packed(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | unsigned(item);
}
__device__ float value_of(Packed packed) {
  const unsigned ordered = unsigned(packed >> 32);
  return __uint_as_float(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered);
}

struct Select {
  Filter filter;
  int64_t items, first;
  Selected selected;
  int64_t in_scratch;  // numbers of a query's buffer there, or 0
};

// A number that exactly `wanted` of n different ones, at least that many, do not exceed. By the whole block.
__device__ Packed smallest(const Packed* numbers, int n, int wanted) {
  __shared__ int counts[kDigits];
  __shared__ int sums[kThreads / 32];
  __shared__ Packed bound;
  __shared__ int below, inside;  // how many are less than those that begin like the bound, and how many begin like it
  static_assert(kDigits == kThreads, "a thread has a digit");
  Packed start = 0;
  for (int shift = 56;; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads)
      if (shift == 56 || numbers[i] >> (shift + 8) == start) atomicAdd(counts + (numbers[i] >> shift) % kDigits, 1);
    __syncthreads();
    const int own = counts[threadIdx.x];
    int up_to = own;  // with all smaller digits
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kWarp, up_to, distance);
      if (threadIdx.x % 32 >= distance) up_to += other;
    }
    if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = up_to;
    __syncthreads();
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) up_to += sums[warp];
    if (up_to - own < wanted && wanted <= up_to) bound = start << 8 | threadIdx.x, below = up_to - own, inside = own;
    __syncthreads();
    start = bound;
    wanted -= below;
    if (wanted == inside) return start << shift | ((Packed(1) << shift) - 1);  // all that begin like it
  }
}

__global__ void __launch_bounds__(kThreads) select(Select s) {
  __shared__ Packed in_shared[kBuffer];
  __shared__ Packed largest[kThreads / 32];
  __shared__ int joined;
  const int64_t q = blockIdx.x;
  const int capacity = int(s.selected.capacity), room = int(s.in_scratch ? s.in_scratch : kBuffer);
  Packed* const buffer = s.in_scratch ? s.selected.scratch + q * s.in_scratch : in_shared;
  float* const values = s.selected.values + q * capacity;
  int64_t* const items = s.selected.items + q * capacity;

  if (threadIdx.x == 0) joined = 0;
  __syncthreads();
  Packed limit = 0;  // of what joins: the largest of those selected
  for (int i = threadIdx.x; i < capacity; i += kThreads)
    if (items[i] >= 0) {
      const Packed packed = pack(values[i], items[i]);
      buffer[atomicAdd(&joined, 1)] = packed;
      limit = packed > limit ? packed : limit;
    }
  for (int distance = 16; distance; distance /= 2) {
    const Packed other = __shfl_xor_sync(kWarp, limit, distance);
    limit = other > limit ? other : limit;
  }
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = limit;
  __syncthreads();
  for (const Packed other : largest) limit = other > limit ? other : limit;
  int n = joined;
  bool changed = false;
  if (n < capacity) limit = ~Packed(0);

  const auto keep_smallest = [&] {
    if (n <= capacity) return;
    limit = smallest(buffer, n, capacity);
    if (threadIdx.x == 0) joined = 0;
    for (int from = 0; from < n; from += kThreads) {
      const int i = from + threadIdx.x;
      const Packed packed = i < n ? buffer[i] : 0;
      __syncthreads();  // what is written below has been read
      if (i < n && packed <= limit) buffer[atomicAdd(&joined, 1)] = packed;
    }
    __syncthreads();
    n = capacity;
  };
  for (int64_t from = 0; from < s.items; from += kSpan) {
    if (n + kSpan > room) keep_smallest();
    Packed packed[kPerThread];
#pragma unroll
    for (int p = 0; p < kPerThread; ++p) {
      const int64_t j = from + p * kThreads + threadIdx.x;
      packed[p] = ~Packed(0);
      if (j >= s.items) continue;
      const float value =
          __fmaf_rn(s.filter.dots[q * s.filter.stride + j], s.filter.item_scale[j], s.filter.item_shift[j]);
      packed[p] = pack(isnan(value) ? -infinity<float>() : value, s.first + j);
    }
    __syncthreads();  // every thread knows n
#pragma unroll
    for (int p = 0; p < kPerThread; ++p)
      if (packed[p] < limit) buffer[atomicAdd(&joined, 1)] = packed[p];
    __syncthreads();
    changed |= joined != n;
    n = joined;
  }
  if (!changed) return;
  keep_smallest();
  for (int i = threadIdx.x; i < capacity; i += kThreads) {
    values[i] = i < n ? value_of(buffer[i]) : infinity<float>();
    items[i] = i < n ? int64_t(unsigned(buffer[i])) : -1;
  }
}

}  // namespace

int64_t nearest_scratch(int64_t capacity) { return capacity + kSpan > kBuffer ? 2 * capacity : 0; }

cudaError_t select_nearest(const Filter& filter, int64_t queries, int64_t items, int64_t first,
                           const Selected& selected, cudaStream_t stream) {
  return launch<Select>(select, queries, kThreads, stream,
                        {filter, items, first, selected, nearest_scratch(selected.capacity)});
}

}  // namespace mgn
