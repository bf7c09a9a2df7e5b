// The module mgn._C, continued: norms and keys of pairs, and the matrix products that decide most pairs.
#include <array>
#include <optional>
#include <string>

#include "bindings_cpu.h"
#include "kernels/canonical_cpu.h"
#include "kernels/products_cpu.h"

namespace {

void canonical_norms(Tensor features, Tensor norms, int64_t set) {
  const auto x = rows(features);
  mgn::canonical_norms(x, pointer<double>(norms, x.count), checked_set(set), parallel);
}

void canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor keys, int64_t set) {
  const auto q = rows(query), g = rows(gallery);
  const int64_t pairs = keys.numel();
  STD_TORCH_CHECK(q.d == g.d, "mgn_cpu: query and gallery must have the same width D, but have ", q.d, " and ", g.d);
  mgn::canonical_keys(q, g, ids(queries, pairs, q.count), ids(items, pairs, g.count), pairs, cosine,
                      pointer<double>(keys, pairs), checked_set(set), parallel);
}

constexpr std::array<const char*, 3> kPrecisions = {"float32", "bfloat16", "int16"};  // as mgn::Precision
constexpr std::array<ScalarType, 3> kPanels = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Short};

// The place of `value` among `all`, if this CPU and instruction set multiply that precision.
template <typename T, typename Value>
std::optional<mgn::Precision> multiplied(const std::array<T, 3>& all, const Value& value, int64_t set) {
  const auto place = std::find(all.begin(), all.end(), value);
  const auto precision = mgn::Precision(place - all.begin());
  if (place == all.end() || !mgn::multiplies(precision, checked_set(set))) return std::nullopt;
  return precision;
}

template <typename T, typename Value>
mgn::Precision precision_of(const std::array<T, 3>& all, const Value& value, int64_t set) {
  const auto precision = multiplied(all, value, set);
  STD_TORCH_CHECK(precision.has_value(),
                  "mgn_cpu: expected float32, or bfloat16 or int16 where this CPU and instruction set multiply them");
  return *precision;
}

bool multiplies(std::string named, int64_t set) { return multiplied(kPrecisions, named, set).has_value(); }

// The precision of the fastest product on this CPU.
std::string fastest_precision() {
  for (const auto precision : {mgn::Precision::bfloat16, mgn::Precision::int16})
    if (mgn::multiplies(precision, 0)) return kPrecisions[int(precision)];
  return "float32";
}

// Of the panels, in elements of their type: a float has room for two of bfloat16 or int16.
int64_t packed_size(int64_t queries, int64_t d, mgn::Precision precision, int64_t set) {
  return mgn::packed_size(queries, d, precision, int(set)) * (precision == mgn::Precision::float32 ? 1 : 2);
}

Tensor pack_queries(Tensor query, std::string named, int64_t set) {
  const auto q = rows(query);
  const auto precision = precision_of(kPrecisions, named, set);
  const Tensor panels = torch::stable::new_empty(query, {packed_size(q.count, q.d, precision, set)},
                                                 kPanels[int(precision)]);
  mgn::pack_queries(q, static_cast<float*>(panels.data_ptr()), precision, int(set), parallel);
  return panels;
}

void products(Tensor panels, Tensor items, int64_t summed, Tensor dots, std::optional<Tensor> norms,
              std::optional<Tensor> residuals, int64_t set) {
  const auto x = rows(items);
  const auto precision = precision_of(kPanels, panels.scalar_type(), set);
  const int64_t together = mgn::terms_together(precision, int(set));
  STD_TORCH_CHECK(summed > 0 && summed % together == 0, "mgn_cpu: expected a number of terms, a positive multiple of ",
                  together, ", but got ", summed);
  STD_TORCH_CHECK(!residuals || (precision != mgn::Precision::float32 && norms),
                  "mgn_cpu: residuals are of bfloat16 and int16, and come with norms");
  STD_TORCH_CHECK(dots.size(0) <= 1 || dots.stride(0) >= x.count, "mgn_cpu: expected rows of dots that do not overlap");
  const int64_t queries = dots.size(0), size = packed_size(queries, x.d, precision, set);
  STD_TORCH_CHECK(panels.is_cpu() && panels.is_contiguous() && panels.numel() == size,
                  "mgn_cpu: expected what pack_queries made of ", queries, " queries of width ", x.d,
                  ", but its number of elements is another");
  mgn::products(static_cast<const float*>(panels.data_ptr()), queries, x, summed,
                const_cast<float*>(matrix<float>(dots, queries, x.count)), dots.stride(0),
                norms ? pointer<double>(*norms, x.count) : nullptr,
                residuals ? pointer<double>(*residuals, x.count) : nullptr, precision, int(set),
                torch::stable::get_num_threads(), parallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mgn_cpu, m) {
  m.def("canonical_norms(Tensor features, Tensor(a!) norms, int instruction_set=0) -> ()");
  m.def(
      "canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor(a!) keys, "
      "int instruction_set=0) -> ()");
  m.def("fastest_precision() -> str");
  m.def("multiplies(str precision, int instruction_set=0) -> bool");
  m.def("pack_queries(Tensor query, str precision, int instruction_set=0) -> Tensor");
  m.def(
      "products(Tensor panels, Tensor items, int summed, Tensor(a!) dots, Tensor(b!)? norms, Tensor(c!)? residuals, "
      "int instruction_set=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CPU, m) {
  m.impl("canonical_norms", TORCH_BOX(&canonical_norms));
  m.impl("canonical_keys", TORCH_BOX(&canonical_keys));
  m.impl("pack_queries", TORCH_BOX(&pack_queries));
  m.impl("products", TORCH_BOX(&products));
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CompositeExplicitAutograd, m) {
  m.impl("fastest_precision", TORCH_BOX(&fastest_precision));
  m.impl("multiplies", TORCH_BOX(&multiplies));
}
