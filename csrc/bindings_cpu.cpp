// The module mgn._C: what torch needs to reach the CPU kernels. Here: mining and distances, and the module itself.
// Callers validate (mgn/ops), outputs come allocated.
//
// Files go by one rule. <op>_cpu.* and <op>_cuda.* belong to one device. <op>_loops.h holds the inner loops of
// <op>_cpu.cpp, compiled once for each instruction set. A name without such an ending (<op>.h) is shared by both
// devices. What several operations use is named by its subject: basics, canonical (sums), squares.
#include "bindings_cpu.h"

#include <Python.h>

#include <optional>
#include <string>

#include "kernels/batch_hard_cpu.h"
#include "kernels/pairwise_distance_cpu.h"

namespace {

template <typename T> mgn::Features<T> features(const Tensor& anchors, const std::optional<Tensor>& others) {
  const Tensor& candidates = others ? *others : anchors;
  STD_TORCH_CHECK(anchors.dim() == 3 && candidates.dim() == 3,
                  "mgn_cpu: expected features of shape (heads, rows, D), but got ", anchors.dim(), " and ",
                  candidates.dim(), " dimensions");
  const int64_t heads = anchors.size(0), n = anchors.size(1), m = candidates.size(1), d = anchors.size(2);
  return {heads, n, m, d, !others, pointer<T>(anchors, heads * n * d), pointer<T>(candidates, heads * m * d)};
}

template <typename T>
mgn::Mined<T> mined(const Tensor& dist_ap, const Tensor& dist_an, const Tensor& pos_idx, const Tensor& neg_idx,
                    int64_t count) {
  return {pointer<T>(dist_ap, count), pointer<T>(dist_an, count), pointer<int64_t>(pos_idx, count),
          pointer<int64_t>(neg_idx, count)};
}

bool batch_hard(Tensor anchors, Tensor labels, std::optional<Tensor> candidates, std::optional<Tensor> candidate_labels,
                Tensor dist_ap, Tensor dist_an, Tensor pos_idx, Tensor neg_idx, std::optional<Tensor> loss,
                std::optional<Tensor> slope, std::optional<double> margin, int64_t set) {
  STD_TORCH_CHECK(!loss == !slope && !candidates == !candidate_labels,
                  "mgn_cpu: pass loss and slope together, and candidates and candidate_labels together");
  return with_type(anchors, [&](auto element) {
    using T = decltype(element);
    const auto x = features<T>(anchors, candidates);
    const auto out = mined<T>(dist_ap, dist_an, pos_idx, neg_idx, x.heads * x.n);
    const auto* all_labels = pointer<int64_t>(candidate_labels ? *candidate_labels : labels, x.m);
    const bool finite = mgn::batch_hard(x, pointer<int64_t>(labels, x.n), all_labels, out, checked_set(set), parallel);
    if (finite && loss)
      mgn::triplet_loss(x.heads, x.n, out, margin ? &*margin : nullptr, pointer<T>(*loss, x.heads),
                        pointer<T>(*slope, x.heads * x.n));
    return finite;
  });
}

void batch_hard_backward(Tensor anchors, std::optional<Tensor> candidates, Tensor dist_ap, Tensor dist_an,
                         Tensor pos_idx, Tensor neg_idx, Tensor grad_ap, std::optional<Tensor> grad_an,
                         std::optional<Tensor> slope, Tensor grad_anchors, Tensor grad_candidates) {
  STD_TORCH_CHECK(slope || grad_an, "mgn_cpu: pass grad_an or slope");
  with_type(anchors, [&](auto element) {
    using T = decltype(element);
    const auto x = features<T>(anchors, candidates);
    const int64_t count = x.heads * x.n;
    const auto pairs = mined<T>(dist_ap, dist_an, pos_idx, neg_idx, count);
    for (const int64_t* idx : {pairs.pos_idx, pairs.neg_idx})
      STD_TORCH_CHECK(
          std::all_of(idx, idx + count, [&](int64_t j) { return j < x.m; }), "expected mined indices below ", x.m,
          ", the number of candidates, but they were changed in place after mining; change a clone instead");
    mgn::batch_hard_backward(x, pairs, pointer<T>(grad_ap, slope ? x.heads : count),
                             slope ? nullptr : pointer<T>(*grad_an, count), slope ? pointer<T>(*slope, count) : nullptr,
                             pointer<T>(grad_anchors, count * x.d), pointer<T>(grad_candidates, x.heads * x.m * x.d),
                             parallel);
  });
}

void pairwise_distance(Tensor x, Tensor y, int64_t metric, Tensor out, int64_t set) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "mgn_cpu: expected x and y of shape (rows, D), but got ", x.dim(),
                  " and ", y.dim(), " dimensions");
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  with_type(x, [&](auto element) {
    using T = decltype(element);
    mgn::pairwise_distance(pointer<T>(x, n * d), pointer<T>(y, m * d), n, m, d, mgn::Metric(metric),
                           pointer<T>(out, n * m), checked_set(set), parallel);
  });
}

std::string instruction_sets() {
  std::string names;
  for (int i = 0; i < mgn::instruction_sets(); ++i) names += (i ? " " : "") + std::string(mgn::instruction_set_name(i));
  return names;
}

std::string sources() { return MGN_SOURCES; }
std::string cuda_module() { return MGN_CUDA_MODULE; }  // "built", or why not

}  // namespace

STABLE_TORCH_LIBRARY(mgn_cpu, m) {
  m.def(
      "batch_hard(Tensor anchors, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor(a!) dist_ap, "
      "Tensor(b!) dist_an, Tensor(c!) pos_idx, Tensor(d!) neg_idx, Tensor(e!)? loss, Tensor(f!)? slope, float? margin, "
      "int instruction_set=0) -> bool");
  m.def(
      "batch_hard_backward(Tensor anchors, Tensor? candidates, Tensor dist_ap, Tensor dist_an, Tensor pos_idx, "
      "Tensor neg_idx, Tensor grad_ap, Tensor? grad_an, Tensor? slope, Tensor(a!) grad_anchors, "
      "Tensor(b!) grad_candidates) -> ()");
  m.def("pairwise_distance(Tensor x, Tensor y, int metric, Tensor(a!) out, int instruction_set=0) -> ()");
  m.def("instruction_sets() -> str");
  m.def("cuda_module() -> str");
  m.def("sources() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CPU, m) {
  m.impl("batch_hard", TORCH_BOX(&batch_hard));
  m.impl("batch_hard_backward", TORCH_BOX(&batch_hard_backward));
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("cuda_module", TORCH_BOX(&cuda_module));
  m.impl("sources", TORCH_BOX(&sources));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
