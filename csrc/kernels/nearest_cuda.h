// The smallest values of rows on CUDA: nearest neighbours, from products tile by tile. No torch header.
#pragma once
#include <cuda_runtime.h>

#include "ranking.h"

namespace mgn {

struct Selected {  // the `capacity` smallest of every query so far, in no order
  int64_t capacity;
  float* values;                // (queries, capacity), inf where there are none yet
  int64_t* items;               // −1 there
  unsigned long long* scratch;  // (queries, nearest_scratch(capacity))
};
int64_t nearest_scratch(int64_t capacity);

// As select_nearest in nearest_cpu.h: merges dots · item_scale + item_shift of the items first, first + 1, … into what
// is selected. Ties go to the lower item, NaN counts as −inf. One launch, of a block for each query.
cudaError_t select_nearest(const Filter& filter, int64_t queries, int64_t items, int64_t first,
                           const Selected& selected, cudaStream_t stream);

}  // namespace mgn
