// Distances of all pairs on the CPU: tiles of squared distances (squares_cpu.h) of rows, or of unit vectors.
//
// Pairs whose sums are too imprecise are measured again in double: sums that may have left T's range, and for the
// cosine in float those below 1/64. A unit vector rounded to float is off by up to 2⁻²⁴, the difference of two by 2⁻²³,
// a squared distance s by a relative 2 · 2⁻²³ / √s: 2e-6 at 1/64, which leaves 8e-6 to the rounding of the sum
// (squares_cpu.h: enough for D up to 16384).
#include "pairwise_distance_cpu.h"

#include "squares_cpu.h"

namespace mgn {
namespace {

constexpr int64_t kPanels = 32;  // of a task

// Unit vectors, exact and as the tiles take them; 0 of a zero vector.
template <typename T> struct Units {
  std::vector<double> exact;
  std::vector<T> rows, zeros;

  Units(int64_t count, int64_t d) : exact(count * d), rows(count * d), zeros(d) {}

  const T* set(const Squares<T>& loops, const T* x, int64_t count, int64_t d) {
    for (int64_t r = 0; r < count; ++r) {
      const double norm = distance(loops, x + r * d, zeros.data(), d);
      for (int64_t k = r * d; k < (r + 1) * d; ++k) rows[k] = T(exact[k] = norm == 0 ? 0 : double(x[k]) / norm);
    }
    return rows.data();
  }
};

template <typename T> T finished(T sum, Metric metric) {
  return metric == Metric::euclidean ? std::sqrt(sum) : metric == Metric::sqeuclidean ? sum : sum / 2;
}

}  // namespace

template <typename T>
void pairwise_distance(const T* x, const T* y, int64_t n, int64_t m, int64_t d, Metric metric, T* out,
                       int instruction_set, const Parallel& parallel) {
  const Squares<T>& loops = squares_of<T>(instruction_set);
  const Squares<double>& in_double = squares_of<double>(instruction_set);
  const bool cosine = metric == Metric::cosine;
  const T low = !cosine ? kTiny<T> : T(sizeof(T) == 4 ? 0x1p-6 : 0);
  const int width = loops.width;
  const int64_t block = n >= 256 ? kBlock : 8, blocks = round_up(n, block) / block;  // a small batch is divided finer
  const int64_t panels = round_up(m, width) / width, together = std::min(grain_of(kPacked, d * width), panels);
  const Packed<T> packed = room_for_panels<T>(together, d * width);

  const auto measure = [&](int64_t i, int64_t count, const T* rows, const Units<T>& units, int64_t panel,
                           const T* panel_rows, Units<T>& column) {
    const int64_t j = panel * width, columns = std::min<int64_t>(width, m - j);
    alignas(64) T sums[kBlock * 32];
    sum_tile(loops, rows, count, panel_rows, d, sums);
    bool doubt = false;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        const T sum = sums[r * width + c];  // a NaN stays as it is
        out[(i + r) * m + j + c] = finished(sum, metric);
        doubt |= sum < low || sum > std::numeric_limits<T>::max();
      }
    for (int64_t c = 0; doubt && c < columns; ++c) {
      bool ready = !cosine;
      for (int64_t r = 0; r < count; ++r) {
        if (!(sums[r * width + c] < low || sums[r * width + c] > std::numeric_limits<T>::max())) continue;
        if (!ready) column.set(loops, y + (j + c) * d, 1, d), ready = true;
        const double dist = cosine ? distance(in_double, units.exact.data() + r * d, column.exact.data(), d)
                                   : distance(loops, x + (i + r) * d, y + (j + c) * d, d);
        out[(i + r) * m + j + c] = T(metric == Metric::euclidean ? dist : finished(dist * dist, metric));
      }
    }
  };

  for (int64_t first = 0; first < panels; first += together) {
    const int64_t here = std::min(together, panels - first), groups = round_up(here, kPanels) / kPanels;
    parallel(here, grain_of(kCopyGrain, d * width), [&](int64_t begin, int64_t end) {
      Units<T> units(cosine ? width : 0, d);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t j = (first + panel) * width, count = std::min<int64_t>(width, m - j);
        const T* rows = cosine ? units.set(loops, y + j * d, count, d) : y + j * d;
        pack_panel(rows, count, d, d, width, packed.get() + panel * d * width);
      }
    });
    const int64_t cost = block * std::min(here, kPanels) * width * std::max<int64_t>(d, 1);
    parallel(blocks * groups, grain_of(kGrain, cost), [&](int64_t begin, int64_t end) {
      Units<T> units(cosine ? block : 0, d), column(cosine, d);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / groups * block, count = std::min(block, n - i), from = task % groups * kPanels;
        const T* rows = cosine ? units.set(loops, x + i * d, count, d) : x + i * d;
        for (int64_t panel = from; panel < std::min(from + kPanels, here); ++panel)
          measure(i, count, rows, units, first + panel, packed.get() + panel * d * width, column);
      }
    });
  }
}

template void pairwise_distance(const float*, const float*, int64_t, int64_t, int64_t, Metric, float*, int,
                                const Parallel&);
template void pairwise_distance(const double*, const double*, int64_t, int64_t, int64_t, Metric, double*, int,
                                const Parallel&);

}  // namespace mgn
