// The smallest values of rows on the CPU: nearest neighbours, from products tile by tile or from distances.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// Merges dots · item_scale + item_shift, (queries, items) of the items first, first + 1, …, into the `capacity`
// smallest of every query so far: values (inf where there are none yet) and items (−1), in no order. NaN counts as
// −inf. error and levels are not read. by_item: dots are (items, queries).
void select_nearest(const Filter& filter, bool by_item, int64_t queries, int64_t items, int64_t first,
                    int64_t capacity, float* values, int64_t* numbers, int instruction_set,
                    const Parallel& parallel);

// The k smallest of each row by (value, column), ascending. Returns a row with a NaN, or −1.
template <typename T>
int64_t nearest_in_distances(const T* distances, int64_t rows, int64_t columns, int64_t stride, int64_t k, T* values,
                             int64_t* numbers, int instruction_set, const Parallel& parallel);

}  // namespace mgn
