#include "nearest_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "canonical_cpu.h"

namespace mgn {
namespace {

constexpr int kChunk = 2048;         // values at a time
constexpr int64_t kGrain = 1 << 16;  // values worth a thread
constexpr int64_t kLine = 16;        // queries that are gathered together from products by item

template <typename T> struct SelectLoops {
  int (*find_below)(const T* values, int n, T limit, int* positions);
};

}  // namespace
}  // namespace mgn

#define LOOPS "nearest_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {
namespace {

template <typename T> const SelectLoops<T>& select_loops(int instruction_set) {
  static constexpr const SelectLoops<T>* kAll[] = {OF_EACH_INSTRUCTION_SET(kSelectLoops<T>)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// A value and its item as one unsigned number, in the order of (value, item); -0 equals 0. Items are below 2^32.
template <typename T> struct Packed {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Number = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;
  static constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);

  static Number pack(T value, int64_t item) {
    value += T(0);
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return Number(bits & kSign ? ~bits : bits | kSign) << 32 | uint32_t(item);
  }
  static T value(Number packed) {
    const Bits ordered = Bits(packed >> 32), bits = ordered & kSign ? ordered ^ kSign : ~ordered;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static int64_t item(Number packed) { return uint32_t(packed); }
};

// The `capacity` smallest of a row by (value, item). It collects up to twice as many, then drops the largest.
template <typename T> struct Selection {
  const SelectLoops<T>& loops;
  const size_t capacity;
  std::vector<typename Packed<T>::Number> kept;
  T limit;  // values at or above it are left out; NaN while there is no limit
  int positions[kChunk];

  Selection(const SelectLoops<T>& loops, int64_t capacity) : loops(loops), capacity(capacity) { clear(); }

  void clear() {
    kept.clear();
    limit = std::numeric_limits<T>::quiet_NaN();
  }

  // Calls on_nan() for a NaN, and takes what that returns in its place.
  template <typename OnNan> void offer(const T* values, int n, int64_t first, const OnNan& on_nan) {
    const int count = loops.find_below(values, n, limit, positions);
    for (int p = 0; p < count; ++p) {
      T value = values[positions[p]];
      if (value >= limit) continue;
      if (value != value) value = on_nan();
      kept.push_back(Packed<T>::pack(value, first + positions[p]));
      if (kept.size() >= capacity + std::max<size_t>(capacity, 64)) shrink();
    }
  }

  void shrink() {
    if (kept.size() < capacity || capacity == 0) return;
    if (kept.size() > capacity) std::nth_element(kept.begin(), kept.begin() + (capacity - 1), kept.end());
    kept.resize(capacity);
    limit = Packed<T>::value(*std::max_element(kept.begin(), kept.end()));
  }
};

// Queries q, q + 1, … of products by item, as rows of `stride`.
void gather(const Filter& filter, int64_t q, int64_t count, int64_t items, float* rows, int64_t stride) {
  for (int64_t j = 0; j < items; ++j)
    for (int64_t r = 0; r < count; ++r) rows[r * stride + j] = filter.dots[j * filter.stride + q + r];
}

}  // namespace

void select_nearest(const Filter& filter, bool by_item, int64_t queries, int64_t items, int64_t first,
                    int64_t capacity, float* values, int64_t* numbers, int instruction_set,
                    const Parallel& parallel) {
  const auto& affine = sum_loops(instruction_set).affine;
  parallel(queries, grain_of(kGrain, items), [&](int64_t begin, int64_t end) {
    Selection<float> selection(select_loops<float>(instruction_set), capacity);
    float chunk[kChunk];
    const int64_t stride = items + kLine;  // not of a power of two, whose rows would push each other out of the cache
    std::vector<float> rows(by_item ? kLine * stride : 0);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t row = (q - begin) % kLine;
      if (by_item && row == 0) gather(filter, q, std::min(kLine, end - q), items, rows.data(), stride);
      const float* const dots = by_item ? rows.data() + row * stride : filter.dots + q * filter.stride;
      selection.clear();
      for (int64_t i = q * capacity; i < (q + 1) * capacity; ++i)
        if (numbers[i] >= 0) selection.kept.push_back(Packed<float>::pack(values[i], numbers[i]));
      selection.shrink();
      for (int64_t j = 0; j < items; j += kChunk) {
        const int n = int(std::min<int64_t>(kChunk, items - j));
        affine(dots + j, filter.item_scale + j, filter.item_shift + j, n, chunk);
        selection.offer(chunk, n, first + j, [] { return -std::numeric_limits<float>::infinity(); });
      }
      selection.shrink();
      for (size_t i = 0; i < selection.kept.size(); ++i) {
        values[q * capacity + i] = Packed<float>::value(selection.kept[i]);
        numbers[q * capacity + i] = Packed<float>::item(selection.kept[i]);
      }
    }
  });
}

template <typename T>
int64_t nearest_in_distances(const T* distances, int64_t rows, int64_t columns, int64_t stride, int64_t k, T* values,
                             int64_t* numbers, int instruction_set, const Parallel& parallel) {
  std::atomic<int64_t> nan_row = -1;
  parallel(rows, grain_of(kGrain, columns), [&](int64_t begin, int64_t end) {
    Selection<T> selection(select_loops<T>(instruction_set), k);
    for (int64_t row = begin; row < end; ++row) {
      selection.clear();
      for (int64_t j = 0; j < columns; j += kChunk)
        selection.offer(distances + row * stride + j, int(std::min<int64_t>(kChunk, columns - j)), j,
                        [&] { return nan_row = row, T(0); });
      selection.shrink();
      std::sort(selection.kept.begin(), selection.kept.end());
      for (int64_t i = 0; i < k; ++i) {
        numbers[row * k + i] = Packed<T>::item(selection.kept[i]);
        values[row * k + i] = distances[row * stride + numbers[row * k + i]];
      }
    }
  });
  return nan_row;
}

template int64_t nearest_in_distances(const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t*, int,
                                      const Parallel&);
template int64_t nearest_in_distances(const double*, int64_t, int64_t, int64_t, int64_t, double*, int64_t*, int,
                                      const Parallel&);

}  // namespace mgn
