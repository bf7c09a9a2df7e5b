// Squared distances in register tiles, for CPU kernels: what batch-hard mining and pairwise distances share.
//
// The columns (candidates) are packed into panels, dimension by dimension, `width` columns side by side. A tile is a
// block of rows and a panel.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "panels_cpu.h"

namespace mgn {

constexpr int kBlock = 32;  // rows of a task, a multiple of every group
// kDepth dimensions are summed at a time, and kGoes such sums before they are added to the total. This bounds the
// rounding at (64 + 64 + D/4096) half units in the last place, and keeps a panel's slice in the first-level cache.
constexpr int64_t kDepth = 64, kGoes = 64;
constexpr int64_t kPacked = 1 << 22;     // elements packed at a time, unless one head or panel has more
constexpr int64_t kGrain = 1 << 17;      // element operations in registers worth a thread
constexpr int64_t kCopyGrain = 1 << 14;  // the same of elements that are copied, converted or compared one by one

template <typename T> struct Squares {
  int group, width;
  void (*add_squares)(const T* const* rows, const T* panel, int64_t from, int64_t to, T* dist2);
  double (*squares)(const T* x, const T* y, int64_t d);
};

}  // namespace mgn

#define LOOPS "squares_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {

template <typename T> const Squares<T>& squares_of(int instruction_set) {
  static constexpr const Squares<T>* kAll[] = {OF_EACH_INSTRUCTION_SET(kSquares<T>)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// dist2: (kBlock, width), of which the first `count` are of rows.
template <typename T>
void sum_tile(const Squares<T>& loops, const T* rows, int64_t count, const T* panel, int64_t d, T* dist2) {
  const int width = loops.width, group = loops.group;
  alignas(64) T part[kBlock * 32];
  std::fill(dist2, dist2 + kBlock * width, T(0));
  for (int64_t begin = 0; begin < d; begin += kGoes * kDepth) {
    T* sums = begin == 0 ? dist2 : part;
    if (begin > 0) std::fill(part, part + kBlock * width, T(0));
    for (int64_t from = begin; from < std::min(begin + kGoes * kDepth, d); from += kDepth)
      for (int64_t i = 0; i < count; i += group) {
        const T* pointers[8];
        for (int r = 0; r < group; ++r) pointers[r] = rows + std::min(i + r, count - 1) * d;
        loops.add_squares(pointers, panel, from, std::min(from + kDepth, d), sums + i * width);
      }
    if (begin > 0) std::transform(dist2, dist2 + kBlock * width, part, dist2, std::plus<T>());
  }
}

// Squares in T are not trusted if they may have left T's range: infinite, or below kTiny.
template <typename T> constexpr T kTiny = T(sizeof(T) == 4 ? 0x1p-80 : 0x1p-900);

// Euclidean distance in double: right wherever it can be represented; NaN and infinity as the formula has them.
template <typename T> double distance(const Squares<T>& loops, const T* x, const T* y, int64_t d) {
  const double sum = loops.squares(x, y, d);
  if (!(sum <= 1e-280) && !std::isinf(sum)) return std::sqrt(sum);
  double largest = 0;  // squares have left double's range, or all are zero
  for (int64_t k = 0; k < d; ++k) largest = std::max(largest, std::abs(double(x[k]) - double(y[k])));
  if (largest == 0 || std::isinf(largest)) return largest;
  double ratios = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double ratio = (double(x[k]) - double(y[k])) / largest;
    ratios += ratio * ratio;
  }
  return largest * std::sqrt(ratios);
}

}  // namespace mgn
