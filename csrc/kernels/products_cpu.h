// Float32 products of query and gallery rows on the CPU, from which ranking filters.
//
// A library's product may add up D terms in any order, which bounds its error by D roundings. This one adds up `summed`
// terms at a time, then these sums, so that its bound is a fraction of that, and few pairs are left to their keys.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// Whether this CPU has units for products of bfloat16, which split rows take.
bool multiplies_split();

// In float32 elements, of the panels that pack_queries writes.
int64_t packed_size(int64_t queries, int64_t d, bool split, int instruction_set);

// (count, D) rows → panels, as `products` of the same kind reads them. split: each number as two of bfloat16.
void pack_queries(const Rows& query, float* panels, bool split, int instruction_set, const Parallel& parallel);

// dots (queries, items) in rows of `stride`: the products. Of D terms, `summed` go into a sum one after the other, then
// these sums into sums, one after the other: at most summed + 2 · ⌈D / summed⌉ roundings of any term. If given, `norms`
// gets the items' canonical norms, on the way.
//
// A split row is high + low + rest, of which rest is lost, and low · low is left out. By Cauchy and Schwarz, and since
// 2xy ≤ x² + y², this is at most (ρ(q) + ρ(g) + ρ(q) ρ(g)) ‖q‖ ‖g‖ with ρ = ‖rest‖ / ‖row‖ + (‖low‖ / ‖row‖)² / 2. If
// given, `residuals` gets the items' ρ and a hundredth, for its own roundings; 0 of norms not from 2⁻⁴⁰ to 2⁶⁰. And
// `summed` is a multiple of 32; so many terms are 17 + 3 · summed / 32 roundings at most: of every 32 terms low · high,
// high · high and high · low are added to the sum one after the other, each as two sums of 16.
void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, double* residuals, bool split, int instruction_set, int64_t threads,
              const Parallel& parallel);

}  // namespace mgn
