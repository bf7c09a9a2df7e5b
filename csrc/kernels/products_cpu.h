// Float32 products of query and gallery rows on the CPU, from which ranking filters.
//
// A library's product may add up D terms in any order, which bounds its error by D roundings. This one adds up `summed`
// terms at a time, then these sums, so that its bound is a fraction of that, and few pairs are left to their keys.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// Of the operands. bfloat16: two of them hold a number, for AMX. int16: whole multiples of a step, for VNNI.
enum class Precision { float32, bfloat16, int16 };

// Whether this CPU has the units for it, with this instruction set.
bool multiplies(Precision precision, int instruction_set);

// `summed` has to be a multiple of it.
int64_t terms_together(Precision precision, int instruction_set);

// In floats, of the panels that pack_queries writes.
int64_t packed_size(int64_t queries, int64_t d, Precision precision, int instruction_set);

// (count, D) rows → panels, as `products` of the same precision reads them.
void pack_queries(const Rows& query, float* panels, Precision precision, int instruction_set,
                  const Parallel& parallel);

// dots (queries, items) in rows of `stride`: the products. Of D terms, `summed` go into a sum one after the other, then
// these sums into sums, one after the other: at most summed + 2 · ⌈D / summed⌉ roundings of any term. If given, `norms`
// gets the items' canonical norms, on the way.
//
// bfloat16: a row is high + low + rest, of which rest is lost, and low · low is left out. By Cauchy and Schwarz, and
// since 2xy ≤ x² + y², this is at most (ρ(q) + ρ(g) + ρ(q) ρ(g)) ‖q‖ ‖g‖, ρ being ‖rest‖ / ‖row‖ + (‖low‖ / ‖row‖)² /
// 2. If given, `residuals` gets the items' ρ and a hundredth, for its own roundings; 0 of norms not from 2⁻⁴⁰ to 2⁶⁰.
// `summed` terms are 17 + 3 · summed / 32 roundings at most: of every 32 terms low · high, high · high and high · low
// are added to the sum one after the other, each as two sums of 16.
//
// int16: each 64 terms of a row are whole multiples of a step, and rest; ρ is ‖rest‖ / ‖row‖. The sum of 64 products is
// exact, whatever `summed` is. In all, at most 5 + D / 32 roundings.
void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, double* residuals, Precision precision, int instruction_set, int64_t threads,
              const Parallel& parallel);

}  // namespace mgn
