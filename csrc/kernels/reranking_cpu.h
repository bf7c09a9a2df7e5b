// k-reciprocal re-ranking on the CPU: sparse rows and final distances. The caller checks items, columns and rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "basics_cpu.h"

namespace mgn {

// Row i is columns[offsets[i]] … columns[offsets[i + 1]], ascending, and their values.
struct Sparse {
  const int64_t* offsets;
  const int32_t* columns;
  const double* values;
};
// The same, made by several threads: a row's columns and values.
struct SparseRows {
  std::vector<std::vector<int32_t>> columns;
  std::vector<std::vector<double>> values;
};

// Each item's expanded k-reciprocal neighbours, without values. items: (n, k), the nearest of each, nearest first.
// half: how many of a neighbour's own neighbours may join.
SparseRows reciprocal(const int64_t* items, int64_t n, int64_t k, int64_t half, const Parallel& parallel);

// Means of the k rows that items (n, k) name; `width` columns.
SparseRows mean_rows(const Sparse& rows, int64_t width, const int64_t* items, int64_t n, int64_t k,
                     const Parallel& parallel);

// The transposed matrix, its rows being the columns, into offsets (width + 1), columns and values.
void transpose(const Sparse& rows, int64_t n, int64_t width, int64_t* offsets, int32_t* columns, double* values);

// Jaccard distances of n rows to `items` others, given as columns, where the two overlap.
SparseRows overlap(const Sparse& rows, int64_t n, const Sparse& columns, int64_t items, const Parallel& parallel);

// Final distances: (1 − lambda) · Jaccard + lambda · d² / maxima[q], where d² is (1 + key)² for cosine, else the key.
struct Reranked {
  const int64_t* offsets;  // of query q's items whose Jaccard distance is not 1: offsets[q] … offsets[q + 1], ascending
  const int32_t* items;
  const double *jaccard, *maxima;
  double lambda;
};

// Calls visit(item, jaccard) for every overlap of the query with an item of first … end; no other, whatever items hold.
template <typename Visit>
void for_overlaps(const Reranked& reranked, int64_t q, int64_t first, int64_t end, const Visit& visit) {
  const int32_t *from = reranked.items + reranked.offsets[q], *to = reranked.items + reranked.offsets[q + 1];
  for (const int32_t* item = std::lower_bound(from, to, first); item < to && *item < end; ++item)
    if (*item >= first) visit(*item, reranked.jaccard[item - reranked.items]);
}

inline double final_distance(const Reranked& reranked, int64_t q, bool cosine, double key, double jaccard) {
  const double root = std::max(1 + key, 0.0), square = cosine ? root * root : key;
  double of_jaccard = (1 - reranked.lambda) * jaccard;
  double of_distance = reranked.lambda * (reranked.maxima[q] > 0 ? square / reranked.maxima[q] : 0);
  KEEP_ROUNDED(of_jaccard);
  KEEP_ROUNDED(of_distance);
  return of_jaccard + of_distance;
}

// The lowest and the highest key that a pair without overlap may have if this is its final distance.
inline std::pair<double, double> keys_of_final(const Reranked& reranked, int64_t q, bool cosine, double final) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double flat = 1 - reranked.lambda, unit = reranked.maxima[q] / reranked.lambda;
  if (reranked.lambda == 0 || reranked.maxima[q] == 0)  // all pairs have the same final distance
    return {final < flat ? -infinity : final > flat ? infinity : -infinity, final < flat ? -infinity : infinity};
  if (!(unit < 1e300)) return {-infinity, infinity};
  const double low = (final - flat) * unit - unit * 0x1p-48, high = (final - flat) * unit + unit * 0x1p-48;
  if (high < 0) return {-infinity, -infinity};
  return {cosine ? std::sqrt(std::max(low, 0.0)) - 1 - 0x1p-50 : low, cosine ? std::sqrt(high) - 1 + 0x1p-50 : high};
}

}  // namespace mgn
