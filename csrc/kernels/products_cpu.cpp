// Float32 products on the CPU: register tiles of queries × items over packed panels, in the manner of Goto and van de
// Geijn ("Anatomy of high-performance matrix multiplication", ACM TOMS 2008).
#include "products_cpu.h"

#include "canonical_cpu.h"
#include "panels_cpu.h"

namespace mgn {
namespace {

constexpr int64_t kItems = 64;         // packed at a time: with their dimensions, half of a second-level cache
constexpr int64_t kDimensions = 4096;  // of them at a time
constexpr int64_t kQueries = 512;      // that are worth packing items for, once more

struct ProductLoops {
  int high, wide;
  void (*add_products)(const float* rows, const float* columns, int64_t count, float* sums);
  void (*pack_columns)(const float* rows, int64_t count, int64_t stride, int64_t d, float* columns);
};

}  // namespace
}  // namespace mgn

#define LOOPS "products_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {
namespace {

const ProductLoops& product_loops(int instruction_set) {
  static constexpr const ProductLoops* kAll[] = {OF_EACH_INSTRUCTION_SET(kProductLoops)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// The products of some panels of queries with up to kItems items, which are packed here. One per thread.
struct ItemProducts {
  const ProductLoops& loops;
  const Rows& items;
  const int64_t summed, groups = kItems / loops.wide;
  Packed<float> columns = room_for_panels<float>(groups, std::min(items.d, kDimensions) * loops.wide);
  Packed<float> sums = room_for_panels<float>(groups, loops.high * loops.wide);
  int64_t first = -1, begin = -1, count = 0, dimensions = 0;  // of what is packed

  void pack(int64_t first_item, int64_t begin_dimension) {
    if (first == first_item && begin == begin_dimension) return;
    first = first_item, begin = begin_dimension;
    count = std::min(kItems, items.count - first), dimensions = std::min(kDimensions, items.d - begin);
    for (int64_t j = 0; j < count; j += loops.wide)
      loops.pack_columns(items[first + j] + begin, std::min<int64_t>(loops.wide, count - j), items.stride, dimensions,
                         columns.get() + j * dimensions);
  }

  // Adds to, or writes if these are the first dimensions, `rows` rows of dots. panel: (D, high).
  void add(const float* panel, int64_t rows, float* dots, int64_t stride) {
    const int64_t tile = loops.high * loops.wide;
    std::fill_n(sums.get(), groups * tile, 0.0f);
    for (int64_t k = 0; k < dimensions; k += summed)
      for (int64_t j = 0; j < count; j += loops.wide)
        loops.add_products(panel + (begin + k) * loops.high, columns.get() + j * dimensions + k * loops.wide,
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

int panel_rows(int instruction_set) { return product_loops(instruction_set).high; }

void pack_queries(const Rows& query, float* panels, int instruction_set, const Parallel& parallel) {
  const int64_t high = panel_rows(instruction_set), d = query.d;
  parallel(round_up(query.count, high) / high, grain_of(1 << 16, high * d), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin * high; q < std::min(end * high, query.count); q += high)
      pack_panel(query[q], std::min(high, query.count - q), query.stride, d, high, panels + q * d);
  });
}

void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, int instruction_set, const Parallel& parallel) {
  const ProductLoops& loops = product_loops(instruction_set);
  const int64_t high = loops.high, groups = round_up(items.count, kItems) / kItems;
  const int64_t parts = std::max<int64_t>(1, queries / kQueries), part = round_up((queries + parts - 1) / parts, high);
  parallel(groups * parts, 1, [&](int64_t first, int64_t end) {
    ItemProducts of_items{loops, items, summed};
    for (int64_t task = first; task < end; ++task)
      for (int64_t k = 0; k < std::max<int64_t>(items.d, 1); k += kDimensions) {
        const int64_t item = task / parts * kItems;
        of_items.pack(item, k);
        if (norms && k == 0 && task % parts == 0)
          canonical_norms(items, item, std::min(item + kItems, items.count), sum_loops(instruction_set), norms);
        const int64_t from = task % parts * part;
        for (int64_t q = from; q < std::min(from + part, queries); q += high)
          of_items.add(panels + q * items.d, std::min(high, queries - q), dots + q * stride, stride);
      }
  });
}

}  // namespace mgn
