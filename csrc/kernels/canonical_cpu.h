// Canonical sums on the CPU: norms, and the keys that order a gallery.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// ‖row‖, from the canonical sum; not finite where an element is not.
void canonical_norms(const Rows& rows, double* norms, int instruction_set, const Parallel& parallel);

// Keys of the pairs (queries[p], items[p]). The fastest order is one in which pairs of one query stand together.
void canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items, int64_t pairs,
                    bool cosine, double* keys, int instruction_set, const Parallel& parallel);

// For the kernels that need norms and keys on the way.

struct SumLoops {
  void (*products)(const float* x, const float* const* y, int rows, int64_t d, double* out);
  void (*squared_differences)(const float* x, const float* const* y, int rows, int64_t d, double* out);
  void (*squares)(const float*, const float* const* y, int rows, int64_t d, double* out);
  void (*affine)(const float* dots, const float* scale, const float* shift, int n, float* similarity);
};

const SumLoops& sum_loops(int instruction_set);

// The norms of rows begin … end, on one thread.
void canonical_norms(const Rows& rows, int64_t begin, int64_t end, const SumLoops& loops, double* norms);

// The keys of one row with any others, be it of the query and they of the gallery or the other way round.
struct Keys {
  const SumLoops& loops;
  const bool cosine;
  const int64_t d;
  const float* row = nullptr;
  double norm = 0;

  void set(const float* new_row, double new_norm) { row = new_row, norm = new_norm; }

  // y one row or two, and their norms.
  void operator()(const float* const* y, const double* norms, int rows, double* keys) const {
    (cosine ? loops.products : loops.squared_differences)(row, y, rows, d, keys);
    for (int r = 0; r < rows && cosine; ++r) keys[r] = norm * norms[r] > 0 ? -(keys[r] / (norm * norms[r])) : 0;
  }
};

}  // namespace mgn
