// Sparse rows of k-reciprocal re-ranking, on the CPU. Items, columns and rows are checked by the caller.
#pragma once
#include <vector>

#include "cpu.h"

namespace mgn {

// Row i is columns[offsets[i]] … columns[offsets[i + 1]], ascending, and their values.
struct Sparse {
  const int64_t* offsets;
  const int32_t* columns;
  const double* values;
};
struct SparseRows {
  std::vector<int64_t> offsets;
  std::vector<int32_t> columns;
  std::vector<double> values;
};

// Each item's expanded k-reciprocal neighbours, without values. items: (n, k) the nearest of each, nearest first; half: how many of them
// are asked whether a neighbour's neighbours join.
SparseRows reciprocal(const int64_t* items, int64_t n, int64_t k, int64_t half, const Parallel& parallel);

// Means of the k rows that items (n, k) name; `width` columns.
SparseRows mean_rows(const Sparse& rows, int64_t width, const int64_t* items, int64_t n, int64_t k, const Parallel& parallel);

// Columns as rows.
SparseRows transpose(const Sparse& rows, int64_t n, int64_t width);

// Jaccard distances of n rows to `items` others, given as columns, where the two overlap.
SparseRows overlap(const Sparse& rows, int64_t n, const Sparse& columns, int64_t items, const Parallel& parallel);

}  // namespace mgn
