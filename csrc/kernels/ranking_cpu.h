// Retrieval ranks on the CPU: counting the non-matches that lie nearer than a match.
#pragma once
#include "cpu.h"
#include "ranking.h"

namespace mgn {

// Final distances of re-ranking: (1 − lambda) · Jaccard + lambda · d² / maxima[q], where d² is (1 + key)² for cosine, else the key.
struct Reranked {
  const int64_t* offsets;  // of query q's items whose Jaccard distance is not 1: offsets[q] … offsets[q + 1], ascending
  const int32_t* items;
  const double *jaccard, *maxima;
  double lambda;
};

// Counts the non-matches of the tile, by final distances where `reranked` is given: then these are the matches' keys, and the order is
// that of (final distance, item). Returns how many of them went by key.
int64_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded, const Reranked* reranked,
                        int instruction_set, const Parallel& parallel);

// The same from distances (queries, items) in rows of `stride`, whose keys are their values. Returns a query with a NaN, or −1.
template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel);

}  // namespace mgn
