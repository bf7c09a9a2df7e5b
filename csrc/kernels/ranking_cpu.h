// Retrieval ranks on the CPU: counting the non-matches that lie nearer than a match.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

struct Reranked;  // in reranking_cpu.h

// Counts the non-matches of the tile. If `reranked` is given, final distances take the place of all keys, the matches'
// too. Returns how many items were decided by their keys.
int64_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded,
                         const Reranked* reranked, int instruction_set, const Parallel& parallel);

// The same from distances (queries, items) in rows of `stride`, which are keys. Returns a query with a NaN, or −1.
template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel);

// For both of them: calls visit(item) for every excluded item of first … end.
template <typename Visit>
void for_excluded(const Excluded& excluded, int64_t q, int64_t first, int64_t end, const Visit& visit) {
  const auto all = [&](const int64_t* from, const int64_t* to) {
    for (const int64_t* item = std::lower_bound(from, to, first); item < to && *item < end; ++item)
      if (*item >= first) visit(*item);  // of a list that does not ascend, the search says nothing
  };
  all(excluded.order + excluded.begin[q], excluded.order + excluded.end[q]);
  all(excluded.junk, excluded.junk + excluded.junk_count);
}

}  // namespace mgn
