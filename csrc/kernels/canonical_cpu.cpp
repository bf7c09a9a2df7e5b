#include "canonical_cpu.h"

#include <algorithm>
#include <cmath>

namespace mgn {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements worth a thread

enum class Term { product, squared_difference, square };

}  // namespace
}  // namespace mgn

#define LOOPS "canonical_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {

const SumLoops& sum_loops(int instruction_set) {
  static constexpr const SumLoops* kAll[] = {OF_EACH_INSTRUCTION_SET(kSumLoops)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

void canonical_norms(const Rows& rows, int64_t begin, int64_t end, const SumLoops& loops, double* norms) {
  for (int64_t i = begin; i < end; i += 2) {
    const int count = i + 1 < end ? 2 : 1;
    const float* const both[] = {rows[i], rows[i + count - 1]};
    double squares[2];
    loops.squares(nullptr, both, count, rows.d, squares);
    for (int r = 0; r < count; ++r) norms[i + r] = std::sqrt(squares[r]);
  }
}

void canonical_norms(const Rows& rows, double* norms, int instruction_set, const Parallel& parallel) {
  const SumLoops& loops = sum_loops(instruction_set);
  parallel(rows.count, std::max<int64_t>(2, grain_of(kGrain, rows.d)),
           [&](int64_t begin, int64_t end) { canonical_norms(rows, begin, end, loops, norms); });
}

void canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items, int64_t pairs,
                    bool cosine, double* keys, int instruction_set, const Parallel& parallel) {
  const SumLoops& loops = sum_loops(instruction_set);
  parallel(pairs, std::max<int64_t>(2, grain_of(kGrain, query.d)), [&](int64_t begin, int64_t end) {
    Keys keys_of{loops, cosine, query.d};
    for (int64_t p = begin; p < end;) {
      if (p == begin || queries[p] != queries[p - 1]) {
        const float* const row = query[queries[p]];
        double square;
        loops.squares(nullptr, &row, 1, query.d, &square);
        keys_of.set(row, std::sqrt(square));
      }
      const int count = p + 1 < end && queries[p + 1] == queries[p] ? 2 : 1;
      if (p + count < end && queries[p + count] != queries[p])  // the next row comes from memory meanwhile
        fetch(query[queries[p + count]], query.d);
      const float* const y[] = {gallery[items[p]], gallery[items[p + count - 1]]};
      double norms[2] = {};
      if (cosine) loops.squares(nullptr, y, count, query.d, norms);
      for (double& norm : norms) norm = std::sqrt(norm);
      keys_of(y, norms, count, keys + p);
      p += count;
    }
  });
}

}  // namespace mgn
