#include "reranking_cpu.h"

#include <algorithm>
#include <numeric>

namespace mgn {
namespace {

constexpr int64_t kGrain = 64;  // rows worth a thread

// A dense row that remembers which columns were added to.
struct Sum {
  std::vector<double> dense;
  std::vector<char> seen;
  std::vector<int32_t> touched;

  explicit Sum(int64_t width) : dense(width), seen(width) {}

  void add(int32_t column, double value) {
    if (!seen[column]) seen[column] = true, touched.push_back(column);
    dense[column] += value;
  }

  // Calls visit(column, sum), ascending, and clears.
  template <typename Visit> void drain(const Visit& visit) {
    std::sort(touched.begin(), touched.end());
    for (const int32_t column : touched) {
      visit(column, dense[column]);
      dense[column] = 0;
      seen[column] = false;
    }
    touched.clear();
  }
};

// Rows that several threads make, one after the other: make(row, columns, values) appends.
template <typename Maker> SparseRows gather(int64_t n, const Parallel& parallel, const Maker& maker) {
  SparseRows rows{std::vector<std::vector<int32_t>>(n), std::vector<std::vector<double>>(n)};
  parallel(n, kGrain, [&](int64_t begin, int64_t end) {
    auto make = maker();  // a thread's own memory
    for (int64_t row = begin; row < end; ++row) make(row, rows.columns[row], rows.values[row]);
  });
  return rows;
}

}  // namespace

SparseRows reciprocal(const int64_t* items, int64_t n, int64_t k, int64_t half, const Parallel& parallel) {
  // The first `many` neighbours of every item that have it among their own first `many`.
  const auto mutual = [&](int64_t many) {
    return gather(n, parallel, [=] {
      return [=](int64_t i, auto& columns, auto&) {
        for (int64_t p = 0; p < many; ++p) {
          const int64_t* others = items + items[i * k + p] * k;
          if (std::find(others, others + many, i) != others + many) columns.push_back(int32_t(items[i * k + p]));
        }
        std::sort(columns.begin(), columns.end());
      };
    });
  };
  const SparseRows own = mutual(k), of_others = mutual(std::min(half, k));
  return gather(n, parallel, [&] {
    return [&](int64_t i, auto& columns, auto&) {
      const auto& near = own.columns[i];
      columns = near;
      for (const int32_t j : near) {
        const auto& others = of_others.columns[j];
        const auto shared = std::count_if(others.begin(), others.end(), [&](int32_t c) {
          return std::binary_search(near.begin(), near.end(), c);
        });
        if (3 * shared > 2 * int64_t(others.size())) columns.insert(columns.end(), others.begin(), others.end());
      }
      std::sort(columns.begin(), columns.end());
      columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
    };
  });
}

SparseRows mean_rows(const Sparse& rows, int64_t width, const int64_t* items, int64_t n, int64_t k,
                     const Parallel& parallel) {
  return gather(n, parallel, [&] {
    return [&, sum = Sum(width)](int64_t i, auto& columns, auto& values) mutable {
      for (int64_t p = i * k; p < (i + 1) * k; ++p)
        for (int64_t e = rows.offsets[items[p]]; e < rows.offsets[items[p] + 1]; ++e)
          sum.add(rows.columns[e], rows.values[e]);
      sum.drain([&](int32_t column, double total) { columns.push_back(column), values.push_back(total / double(k)); });
    };
  });
}

void transpose(const Sparse& rows, int64_t n, int64_t width, int64_t* offsets, int32_t* columns, double* values) {
  std::fill(offsets, offsets + width + 1, 0);
  for (int64_t e = 0; e < rows.offsets[n]; ++e) ++offsets[rows.columns[e] + 1];
  std::partial_sum(offsets, offsets + width + 1, offsets);
  std::vector<int64_t> next(offsets, offsets + width);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t e = rows.offsets[row]; e < rows.offsets[row + 1]; ++e) {
      const int64_t at = next[rows.columns[e]]++;
      columns[at] = int32_t(row);
      values[at] = rows.values[e];
    }
}

SparseRows overlap(const Sparse& rows, int64_t n, const Sparse& columns, int64_t items, const Parallel& parallel) {
  return gather(n, parallel, [&] {
    return [&, sum = Sum(items)](int64_t row, auto& overlapping, auto& values) mutable {
      for (int64_t e = rows.offsets[row]; e < rows.offsets[row + 1]; ++e)
        for (int64_t o = columns.offsets[rows.columns[e]]; o < columns.offsets[rows.columns[e] + 1]; ++o)
          sum.add(columns.columns[o], std::min(rows.values[e], columns.values[o]));
      sum.drain([&](int32_t item, double smallest) {
        overlapping.push_back(item), values.push_back(1 - smallest / (2 - smallest));
      });
    };
  });
}

}  // namespace mgn
