// Retrieval ranks on CUDA: canonical sums, and counting the non-matches that lie nearer than a match. No torch header.
#pragma once
#include <cuda_runtime.h>

#include "ranking.h"

namespace mgn {

// ‖row‖, from the canonical sum; not finite where an element is not.
cudaError_t canonical_norms(const Rows& rows, double* norms, cudaStream_t stream);

// Rounds rows to (count, d) of tf32's 11 bits, to nearest, ties away from zero. residual: ‖row − rounded row‖ / norm.
cudaError_t round_to_tf32(const Rows& rows, const double* norms, float* rounded, double* residual,
                          cudaStream_t stream);

// Keys of the pairs (queries[p], items[p]).
cudaError_t canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items,
                           int64_t pairs, bool cosine, double* keys, cudaStream_t stream);

struct Scratch {
  float *low, *high;  // one for each match
  int64_t* open;      // one for each product: the list can never be full
  int* open_count;
};

// Counts the non-matches of the tile; *redecided grows by how many of them were decided by their keys.
cudaError_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded,
                             const Scratch& scratch, int64_t* redecided, cudaStream_t stream);

}  // namespace mgn
