// Panels: rows side by side, dimension by dimension, so that a register takes one dimension of many rows.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "basics_cpu.h"

namespace mgn {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Aligned {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T> using Packed = std::unique_ptr<T, Aligned>;

template <typename T> Packed<T> room_for_panels(int64_t panels, int64_t size) {
  Packed<T> packed(
      static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(panels * size, 1) * int64_t(sizeof(T)), 64))));
  if (!packed) throw std::bad_alloc();
  return packed;
}

// (count ≤ width, d) rows → panel (d, width); a row beyond the last is NaN, which wins no comparison.
template <typename T>
void pack_panel(const T* rows, int64_t count, int64_t stride, int64_t d, int64_t width, T* panel) {
  if (count < width) std::fill(panel, panel + d * width, std::numeric_limits<T>::quiet_NaN());
  for (int64_t from = 0; from < d; from += 16)  // so few lines of the panel at a time that they stay in the cache
    for (int64_t c = 0; c < count; ++c)
      for (int64_t k = from; k < std::min<int64_t>(from + 16, d); ++k) panel[k * width + c] = rows[c * stride + k];
}

}  // namespace mgn
