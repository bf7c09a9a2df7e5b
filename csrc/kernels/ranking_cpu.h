// Retrieval ranks on the CPU: canonical sums, and counting the strangers that lie nearer than a match.
#pragma once
#include "cpu.h"

namespace mgn {

struct Rows {
  const float* data;
  int64_t count, d, stride;
  const float* operator[](int64_t i) const { return data + i * stride; }
};

// The true matches of some queries: those of query q at offsets[q] … offsets[q + 1], ascending by (key, item).
struct Matches {
  const int64_t* offsets;
  const double* keys;
  const int64_t* items;  // indices in the gallery
  int64_t* counts;       // in and out: how many strangers come before the match
};

// Who is no stranger: the items of the query's own identity, order[begin[q]] … order[end[q]], and junk; both ascending.
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

// ‖row‖, from the canonical sum; not finite where an element is not.
void canonical_norms(const Rows& rows, double* norms, int instruction_set, const Parallel& parallel);

// Keys of the pairs (queries[p], items[p]); pairs of one query stand together.
void canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items, int64_t pairs, bool cosine,
                    double* keys, int instruction_set, const Parallel& parallel);

// Counts the strangers among gallery, which is items first, first + 1, … of the whole. Returns how many of them went by key.
// Norms are read for cosine alone.
int64_t count_strangers(const Rows& query, const Rows& gallery, const double* query_norms, const double* gallery_norms, bool cosine,
                        int64_t first,
                        const Filter& filter, const Matches& matches, const Excluded& excluded, int instruction_set,
                        const Parallel& parallel);

// The same from distances (queries, items) in rows of `stride`, whose keys are their values. Returns a query with a NaN, or −1.
template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel);

}  // namespace mgn
