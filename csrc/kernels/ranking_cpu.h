// Retrieval ranks on the CPU: canonical sums, and counting the strangers that lie nearer than a match.
#pragma once
#include "cpu.h"
#include "ranking.h"

namespace mgn {

// ‖row‖, from the canonical sum; not finite where an element is not.
void canonical_norms(const Rows& rows, double* norms, int instruction_set, const Parallel& parallel);

// Keys of the pairs (queries[p], items[p]); pairs of one query stand together.
void canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items, int64_t pairs, bool cosine,
                    double* keys, int instruction_set, const Parallel& parallel);

// Counts the strangers of the tile. Returns how many of them went by key.
int64_t count_strangers(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded, int instruction_set,
                        const Parallel& parallel);

// The same from distances (queries, items) in rows of `stride`, whose keys are their values. Returns a query with a NaN, or −1.
template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel);

}  // namespace mgn
