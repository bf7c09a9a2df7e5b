// Retrieval ranks on the CPU: counting the non-matches that lie nearer than a match.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

struct Reranked;  // of reranking_cpu.h

// Counts the non-matches of the tile, by final distances where `reranked` is given: then these are the matches' keys, and the order is
// that of (final distance, item). Returns how many of them went by key.
int64_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded, const Reranked* reranked,
                        int instruction_set, const Parallel& parallel);

// The same from distances (queries, items) in rows of `stride`, whose keys are their values. Returns a query with a NaN, or −1.
template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel);

}  // namespace mgn
