// Matrix products on the CPU: register tiles of queries × items over packed panels, in the manner of Goto and van de
// Geijn ("Anatomy of high-performance matrix multiplication", ACM TOMS 2008).
#include "products_cpu.h"

#include <cmath>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "canonical_cpu.h"
#include "panels_cpu.h"

namespace mgn {
namespace {

constexpr double kSmallest = 0x1p-40, kLargest = 0x1p60;  // norms of which a filter says anything, as in product.py

// Squared norms, relative to its own, of a row's low halves and of what neither half, or no whole step, holds.
struct Lost {
  double low = 0, rest = 0;
};

struct ProductLoops {
  bool (*runs)();             // whether this CPU has what they take; null where they were not compiled
  int high, wide;             // of a panel of queries, of items
  int64_t unit, unit_floats;  // D is filled up to a multiple of `unit` terms, which take `unit_floats` floats
  int64_t items, dimensions;  // packed at a time: half of a second-level cache
  int64_t queries;            // at least, of a part, for which items are packed anew so that more threads have work
  void (*pack_rows)(const float* rows, int64_t count, int64_t stride, int64_t d, float* panel);
  // Given norms, it adds to `lost` what of each row is lost.
  void (*pack_columns)(const float* rows, int64_t count, int64_t stride, int64_t d, float* columns,
                       const double* norms, Lost* lost);
  void (*add_products)(const float* rows, const float* columns, int64_t count, float* sums);

  int64_t floats(int64_t terms) const { return round_up(terms, unit) / unit * unit_floats; }  // of one row
};

}  // namespace
}  // namespace mgn

#define LOOPS "products_loops.h"
#include "each_instruction_set_cpu.h"
#undef LOOPS
#define LOOPS "products_int16_loops.h"
#include "each_instruction_set_cpu.h"
#include "products_amx.h"

namespace mgn {
namespace {

const ProductLoops& product_loops(Precision precision, int instruction_set) {
  static constexpr const ProductLoops* kFloat32[] = {OF_EACH_INSTRUCTION_SET(kProductLoops)};
  static constexpr const ProductLoops* kInt16[] = {OF_EACH_INSTRUCTION_SET(kInt16Loops)};
  const int set = compiled_instruction_set(instruction_set);
  if (precision == Precision::bfloat16) return amx::kProductLoops;
  return *(precision == Precision::int16 ? kInt16 : kFloat32)[set];
}

int64_t packed_size(const ProductLoops& loops, int64_t rows, int64_t d) {
  return round_up(rows, loops.high) * loops.floats(d);
}

// The products of some panels of queries with some items, which are packed here. One per thread.
struct ItemProducts {
  const ProductLoops& loops;
  const Rows& items;
  const int64_t summed, groups = loops.items / loops.wide;
  Packed<float> columns = room_for_panels<float>(loops.items, loops.floats(std::min(items.d, loops.dimensions)));
  Packed<float> sums = room_for_panels<float>(groups, loops.high * loops.wide);
  std::vector<Lost> lost = std::vector<Lost>(loops.items);
  int64_t first = -1, begin = -1, count = 0, dimensions = 0;  // of what is packed

  void pack(int64_t first_item, int64_t begin_dimension, const double* norms) {
    if (first == first_item && begin == begin_dimension) return;
    first = first_item, begin = begin_dimension;
    count = std::min(loops.items, items.count - first);
    const int64_t packed = std::min(loops.dimensions, items.d - begin);
    dimensions = round_up(packed, loops.unit);
    for (int64_t j = 0; j < count; j += loops.wide)
      loops.pack_columns(items[first + j] + begin, std::min<int64_t>(loops.wide, count - j), items.stride, packed,
                         columns.get() + j * loops.floats(dimensions), norms ? norms + first + j : nullptr,
                         lost.data() + j);
  }

  void write_residuals(const double* norms, double* residuals) {
    for (int64_t i = 0; i < count; ++i) {
      const auto [low, rest] = std::exchange(lost[i], {});
      const bool known = kSmallest <= norms[first + i] && norms[first + i] <= kLargest;
      residuals[first + i] = known ? 1.01 * (std::sqrt(rest) + low / 2) : 0;
    }
  }

  // Adds to, or writes if these are the first dimensions, `rows` rows of dots. panel: (D, high).
  void add(const float* panel, int64_t rows, float* dots, int64_t stride) {
    const int64_t tile = loops.high * loops.wide;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; j += 16) __builtin_prefetch(dots + r * stride + first + j, 1);
    std::fill_n(sums.get(), groups * tile, 0.0f);
    for (int64_t k = 0; k < dimensions; k += summed)
      for (int64_t j = 0; j < count; j += loops.wide)
        loops.add_products(panel + loops.floats(begin + k) * loops.high,
                           columns.get() + j * loops.floats(dimensions) + loops.floats(k) * loops.wide,
                           std::min(summed, dimensions - k), sums.get() + j * loops.high);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; j += loops.wide) {
        const float* const sum = sums.get() + j * loops.high + r * loops.wide;
        float* const out = dots + r * stride + first + j;
        const int64_t width = std::min<int64_t>(loops.wide, count - j);
        begin ? std::transform(out, out + width, sum, out, std::plus<float>()) : std::copy_n(sum, width, out);
      }
  }
};

}  // namespace

bool multiplies(Precision precision, int instruction_set) {
  if (precision == Precision::bfloat16 && compiled_instruction_set(instruction_set) != 0)
    return false;  // its loops use AVX-512, too
  const auto runs = product_loops(precision, instruction_set).runs;
  return runs && runs();
}

int64_t terms_together(Precision precision, int instruction_set) {
  return product_loops(precision, instruction_set).unit;
}

int64_t packed_size(int64_t queries, int64_t d, Precision precision, int instruction_set) {
  return packed_size(product_loops(precision, instruction_set), queries, d);
}

void pack_queries(const Rows& query, float* panels, Precision precision, int instruction_set,
                  const Parallel& parallel) {
  const ProductLoops& loops = product_loops(precision, instruction_set);
  const int64_t high = loops.high, panel = packed_size(loops, high, query.d);
  parallel(round_up(query.count, high) / high, grain_of(1 << 16, panel), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      loops.pack_rows(query[i * high], std::min(high, query.count - i * high), query.stride, query.d,
                      panels + i * panel);
  });
}

void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, double* residuals, Precision precision, int instruction_set, int64_t threads,
              const Parallel& parallel) {
  const ProductLoops& loops = product_loops(precision, instruction_set);
  const int64_t high = loops.high, panel = packed_size(loops, high, items.d);
  const int64_t groups = round_up(items.count, loops.items) / loops.items;
  const int64_t wanted = 2 * threads / std::max<int64_t>(groups, 1);  // so that there is work for all threads
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, queries / loops.queries));
  const int64_t part = round_up((queries + parts - 1) / parts, high);
  parallel(groups * parts, 1, [&](int64_t first, int64_t end) {
    ItemProducts of_items{loops, items, summed};
    for (int64_t task = first; task < end; ++task) {
      const int64_t item = task / parts * loops.items, end_item = std::min(item + loops.items, items.count);
      const bool is_first = task % parts == 0;
      if (norms && is_first) canonical_norms(items, item, end_item, sum_loops(instruction_set), norms);
      for (int64_t k = 0; k < std::max<int64_t>(items.d, 1); k += loops.dimensions) {
        of_items.pack(item, k, residuals && is_first ? norms : nullptr);
        const int64_t from = task % parts * part;
        for (int64_t q = from; q < std::min(from + part, queries); q += high)
          of_items.add(panels + q / high * panel, std::min(high, queries - q), dots + q * stride, stride);
      }
      if (residuals && is_first) of_items.write_residuals(norms, residuals);
    }
  });
}

}  // namespace mgn
