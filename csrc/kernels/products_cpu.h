// Float32 products of query and gallery rows on the CPU, from which ranking filters.
//
// A library's product may add up D terms in any order, which bounds its error by D roundings. This one adds up `summed`
// terms at a time, then these sums, so that its bound is a fraction of that, and few pairs are left to their keys.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// How many queries stand side by side in a panel.
int panel_rows(int instruction_set);

// (count, D) rows → panels (⌈count / panel_rows⌉, D, panel_rows), as `products` reads them; the last one is filled up.
void pack_queries(const Rows& query, float* panels, int instruction_set, const Parallel& parallel);

// dots (queries, items) in rows of `stride`: the products. Of D terms, `summed` go into a sum one after the other, then
// these sums into sums, one after the other: at most summed + 2 · ⌈D / summed⌉ roundings of any term. If given, `norms`
// gets the items' canonical norms, on the way.
void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, int instruction_set, const Parallel& parallel);

}  // namespace mgn
