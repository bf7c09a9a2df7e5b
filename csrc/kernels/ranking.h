// What the ranking kernels of CPU and CUDA are given. Plain pointers, to memory of the device that computes.
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(__host__)
#define MGN_HOST_DEVICE __host__ __device__
#else
#define MGN_HOST_DEVICE
#endif

namespace mgn {

struct Rows {
  const float* data;
  int64_t count, d, stride;
  MGN_HOST_DEVICE const float* operator[](int64_t i) const { return data + i * stride; }
};

// The true matches of some queries: those of query q at offsets[q] … offsets[q + 1], ascending by (key, item).
struct Matches {
  const int64_t* offsets;
  const double* keys;
  const int64_t* items;  // indices in the gallery
  int64_t* steps;        // in and out: how many non-matches come before the match, but not before the query's last one
};

// Who is no non-match: the items of the query's own identity, order[begin[q]] … order[end[q]], and junk; both ascending.
struct Excluded {
  const int64_t *order, *begin, *end;
  const int64_t* junk;
  int64_t junk_count;
};

// What tells near from far without the keys. similarity = dots · item_scale + item_shift is within error[q] of
// level_scale[q] · key + level_shift[q]; a NaN, or an error that is not finite, says nothing.
struct Filter {
  const float* dots;  // (queries, items) in rows of `stride`
  int64_t stride;
  const float *item_scale, *item_shift;
  const double *level_scale, *level_shift, *error;
};

// Queries and a tile of the gallery: its items first, first + 1, … of the whole. Norms are read for cosine alone.
struct Tile {
  Rows query, gallery;
  const double *query_norms, *gallery_norms;
  bool cosine;
  int64_t first;
};

// Levels of similarity descend from a query's nearest match to its farthest. The first of n that value is above (n of NaN), …
template <typename T>
MGN_HOST_DEVICE int64_t first_below(const T* levels, int64_t n, T value) {
  int64_t from = 0;
  for (int64_t to = n; from < to;) {
    const int64_t middle = (from + to) / 2;
    value > levels[middle] ? to = middle : from = middle + 1;
  }
  return from;
}
// … and the first that it is not below (0 of NaN).
template <typename T>
MGN_HOST_DEVICE int64_t first_reached(const T* levels, int64_t n, T value) {
  int64_t from = 0;
  for (int64_t to = n; from < to;) {
    const int64_t middle = (from + to) / 2;
    value < levels[middle] ? from = middle + 1 : to = middle;
  }
  return from;
}

// The first match of from … to that a non-match with this key and index comes before; `to` if none.
MGN_HOST_DEVICE inline int64_t first_behind(const Matches& matches, int64_t from, int64_t to, double key, int64_t item) {
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    const bool before = key < matches.keys[middle] || (key == matches.keys[middle] && item < matches.items[middle]);
    before ? to = middle : from = middle + 1;
  }
  return from;
}

}  // namespace mgn
