// Products, in float32, of query and gallery rows on the CPU, from which ranking filters.
//
// A library's product may add up D terms in any order, which bounds its error by D roundings. These have a bound of
// their own, a fraction of that for float32, so that few pairs are left to their keys.
#pragma once
#include "basics_cpu.h"
#include "ranking.h"

namespace mgn {

// How operands are held. float32: as they are. bfloat16, for AMX: a number as two. int16, for VNNI: as whole multiples
// of a step.
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

// dots (queries, items) in rows of `stride`: the products. If given, `norms` gets the items' canonical norms.
//
// float32: of D terms, `summed` go into a sum one after the other, then these sums into sums, one after the other: at
// most summed + 2 · ⌈D / summed⌉ roundings of any term.
//
// The others lose a part of each row, so that products differ by up to (ρ(q) + ρ(g) + ρ(q) ρ(g)) ‖q‖ ‖g‖. If given,
// `residuals` gets the items' ρ and a hundredth, for its own roundings; 0 of norms not from 2⁻⁴⁰ to 2⁶⁰.
//
// bfloat16: a row is high + low + rest, of which rest is lost, and low · low is left out. By Cauchy and Schwarz, and
// since 2xy ≤ x² + y², ρ is ‖rest‖ / ‖row‖ + (‖low‖ / ‖row‖)² / 2. `summed` terms are 17 + 3 · summed / 32 roundings at
// most: of every 32 terms low · high, high · high and high · low are added to the sum one after the other, each as two
// sums of 16.
//
// int16: 64 terms of a row at a time are whole multiples of a step, and rest, which is lost; ρ is ‖rest‖ / ‖row‖. The
// sum of 64 products is exact. `summed` terms go through the cache together. At most 5 + D / 32 roundings of any term.
void products(const float* panels, int64_t queries, const Rows& items, int64_t summed, float* dots, int64_t stride,
              double* norms, double* residuals, Precision precision, int instruction_set, int64_t threads,
              const Parallel& parallel);

}  // namespace mgn
