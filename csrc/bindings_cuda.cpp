// The module mgn._cuda: what torch needs to reach the CUDA kernels. Nothing here waits for the device.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/batch_hard_cuda.h"
#include "kernels/nearest_cuda.h"
#include "kernels/pairwise_distance_cuda.h"
#include "kernels/ranking_cuda.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void* pointer(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index() &&
                      tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == count,
                  "mgn_cuda: expected a contiguous tensor of ", count, " elements on the features' device, but got ",
                  tensor.numel(), " elements or another type, layout or device; call mgn.ops, which prepares tensors");
  return tensor.data_ptr();
}
void* pointer(const std::optional<Tensor>& tensor, const Tensor& beside, ScalarType type, int64_t count) {
  return tensor ? pointer(*tensor, beside, type, count) : nullptr;
}
int64_t* indices(const Tensor& tensor, const Tensor& beside, int64_t count) {
  return static_cast<int64_t*>(pointer(tensor, beside, ScalarType::Long, count));
}

mgn::FeatureType feature_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return mgn::FeatureType::float32;
    case ScalarType::Double: return mgn::FeatureType::float64;
    case ScalarType::Half: return mgn::FeatureType::float16;
    default: STD_TORCH_CHECK(type == ScalarType::BFloat16, "mgn_cuda: expected features of a floating-point type");
  }
  return mgn::FeatureType::bfloat16;
}
ScalarType wide(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

mgn::BatchHard mining(const Tensor& anchors, const std::optional<Tensor>& others, const Tensor& dist_ap,
                      const Tensor& dist_an, const Tensor& pos_idx, const Tensor& neg_idx) {
  const Tensor& candidates = others ? *others : anchors;
  STD_TORCH_CHECK(anchors.dim() == 3 && candidates.dim() == 3,
                  "mgn_cuda: expected features of shape (heads, rows, D), but got ", anchors.dim(), " and ",
                  candidates.dim(), " dimensions");
  const int64_t heads = anchors.size(0), n = anchors.size(1), m = candidates.size(1), d = anchors.size(2),
                count = heads * n;
  const ScalarType type = anchors.scalar_type();
  return {feature_type(type), heads, n, m, d, !others, pointer(anchors, anchors, type, count * d),
          pointer(candidates, anchors, type, heads * m * d), pointer(dist_ap, anchors, wide(anchors), count),
          pointer(dist_an, anchors, wide(anchors), count), indices(pos_idx, anchors, count),
          indices(neg_idx, anchors, count)};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "mgn: torch names no current CUDA stream of device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so that no later launch is blamed for it
  STD_TORCH_CHECK(error == cudaSuccess, "mgn_cuda: ", cudaGetErrorString(error));
}

bool batch_hard(Tensor anchors, Tensor labels, std::optional<Tensor> candidates, std::optional<Tensor> candidate_labels,
                Tensor dist_ap, Tensor dist_an, Tensor pos_idx, Tensor neg_idx, std::optional<Tensor> loss,
                std::optional<Tensor> slope, std::optional<double> margin) {
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  STD_TORCH_CHECK(!loss == !slope && !candidates == !candidate_labels,
                  "mgn_cuda: pass loss and slope together, and candidates and candidate_labels together");
  const auto x = mining(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx);
  const mgn::TripletLoss triplet = {pointer(loss, anchors, wide(anchors), x.heads),
                                    pointer(slope, anchors, wide(anchors), x.heads * x.n), !margin, margin.value_or(0)};
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, anchors.get_device_index()));
  const mgn::MiningPlan plan = mgn::plan_mining(x, multiprocessors);
  const Tensor scratch = torch::stable::new_empty(anchors, {plan.scratch_bytes}, ScalarType::Byte);
  check(mgn::batch_hard_forward(x, indices(labels, anchors, x.n),
                                indices(candidate_labels ? *candidate_labels : labels, anchors, x.m), triplet, plan,
                                scratch.data_ptr(), current_stream(anchors)));
  return true;  // as far as is known without waiting: features that are not finite show as NaN
}

void batch_hard_backward(Tensor anchors, std::optional<Tensor> candidates, Tensor dist_ap, Tensor dist_an,
                         Tensor pos_idx, Tensor neg_idx, Tensor grad_ap, std::optional<Tensor> grad_an,
                         std::optional<Tensor> slope, std::optional<Tensor> entries, std::optional<Tensor> offsets,
                         Tensor grad_anchors, Tensor grad_candidates) {
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  const auto x = mining(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx);
  STD_TORCH_CHECK(slope || grad_an, "mgn_cuda: pass grad_an or slope");
  STD_TORCH_CHECK(!entries == !offsets, "mgn_cuda: pass entries and offsets together");
  const ScalarType type = anchors.scalar_type(), arithmetic = wide(anchors);
  const int64_t count = x.heads * x.n;
  const mgn::MinedGradient gradient = {
      pointer(grad_ap, anchors, arithmetic, slope ? x.heads : count),
      pointer(grad_an, anchors, arithmetic, count),
      pointer(slope, anchors, arithmetic, count),
      static_cast<const int64_t*>(pointer(entries, anchors, ScalarType::Long, 2 * count)),
      static_cast<const int64_t*>(pointer(offsets, anchors, ScalarType::Long, x.heads * (x.m + 1))),
      pointer(grad_anchors, anchors, type, count * x.d),
      pointer(grad_candidates, anchors, type, x.heads * x.m * x.d)};
  check(mgn::batch_hard_backward(x, gradient, current_stream(anchors)));
}

mgn::Rows rows(const Tensor& features, const Tensor& beside) {
  STD_TORCH_CHECK(features.is_cuda() && features.get_device_index() == beside.get_device_index() &&
                      features.dim() == 2 && features.scalar_type() == ScalarType::Float &&
                      (features.size(1) <= 1 || features.stride(1) == 1),
                  "mgn_cuda: expected features (n, D) of float32 on one device, contiguous along D; call mgn.ops");
  return {static_cast<const float*>(features.data_ptr()), features.size(0), features.size(1), features.stride(0)};
}
double* doubles(const Tensor& tensor, const Tensor& beside, int64_t count) {
  return static_cast<double*>(pointer(tensor, beside, ScalarType::Double, count));
}
float* floats(const Tensor& tensor, const Tensor& beside, int64_t count) {
  return static_cast<float*>(pointer(tensor, beside, ScalarType::Float, count));
}

void canonical_norms(Tensor features, Tensor norms) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const auto x = rows(features, features);
  check(mgn::canonical_norms(x, doubles(norms, features, x.count), current_stream(features)));
}

void round_to_tf32(Tensor features, Tensor norms, Tensor rounded, Tensor residual) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const auto x = rows(features, features);
  check(mgn::round_to_tf32(x, doubles(norms, features, x.count), floats(rounded, features, x.count * x.d),
                           doubles(residual, features, x.count), current_stream(features)));
}

void canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor keys) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t pairs = keys.numel();
  check(mgn::canonical_keys(rows(query, query), rows(gallery, query), indices(queries, query, pairs),
                            indices(items, query, pairs), pairs, cosine, doubles(keys, query, pairs),
                            current_stream(query)));
}

using Tensors = std::vector<Tensor>;

void count_nonmatches(Tensors tile, bool cosine, int64_t first, Tensors filter_terms, Tensors matches, Tensors excluded,
                      Tensor steps, Tensor redecided) {
  STD_TORCH_CHECK(tile.size() == 4 && filter_terms.size() == 6 && matches.size() == 3 && excluded.size() == 4,
                  "mgn_cuda: expected 4, 6, 3 and 4 tensors, but ", tile.size(), ", ", filter_terms.size(), ", ",
                  matches.size(), " and ", excluded.size(), " were passed; call mgn.ops, which prepares them");
  const Tensor& query = tile[0];
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const auto q = rows(query, query), g = rows(tile[1], query);
  const int64_t m = matches[1].numel(), products = q.count * g.count;
  STD_TORCH_CHECK(q.d == g.d && products < int64_t(1) << 31,
                  "mgn_cuda: expected query and gallery of the same width D and fewer than 2^31 pairs, but got widths ",
                  q.d, " and ", g.d, " and ", products, " pairs");
  const auto integers = [&](const Tensor& tensor, int64_t count) { return indices(tensor, query, count); };
  const auto of_items = [&](int i) { return floats(filter_terms[i], query, g.count); };
  const auto of_queries = [&](int i) { return doubles(filter_terms[i], query, q.count); };
  const Tensor levels = torch::stable::new_empty(filter_terms[0], {2 * m});
  const Tensor open = torch::stable::new_empty(steps, {products});
  const Tensor open_count = torch::stable::new_empty(steps, {1}, ScalarType::Int);
  float* const low = floats(levels, query, 2 * m);
  check(mgn::count_nonmatches(
      {q, g, doubles(tile[2], query, q.count), doubles(tile[3], query, g.count), cosine, first},
      {floats(filter_terms[0], query, products), g.count, of_items(1), of_items(2), of_queries(3), of_queries(4),
       of_queries(5)},
      {integers(matches[0], q.count + 1), doubles(matches[1], query, m), integers(matches[2], m), integers(steps, m)},
      {integers(excluded[0], excluded[0].numel()), integers(excluded[1], q.count), integers(excluded[2], q.count),
       integers(excluded[3], excluded[3].numel()), excluded[3].numel()},
      {low, low + m, integers(open, products), static_cast<int*>(open_count.data_ptr())},
      integers(redecided, 1), current_stream(query)));
}

void select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int64_t first, Tensor values, Tensor items) {
  const torch::stable::accelerator::DeviceGuard guard(dots.get_device_index());
  const int64_t queries = dots.size(0), n = dots.size(1), capacity = values.size(1);
  STD_TORCH_CHECK(first + n <= int64_t(1) << 32 && capacity < int64_t(1) << 30,
                  "mgn_cuda: expected up to 2^32 items, of which fewer than 2^30 are selected, but got ", first + n,
                  " and ", capacity);
  const Tensor scratch = torch::stable::new_empty(items, {queries * mgn::nearest_scratch(capacity)});
  const mgn::Selected selected = {capacity, floats(values, dots, queries * capacity),
                                  indices(items, dots, queries * capacity),
                                  static_cast<unsigned long long*>(scratch.data_ptr())};
  const mgn::Filter filter = {floats(dots, dots, queries * n), n, floats(item_scale, dots, n),
                              floats(item_shift, dots, n)};
  check(mgn::select_nearest(filter, queries, n, first, selected, current_stream(dots)));
}

void pairwise_distance(Tensor x, Tensor y, int64_t metric, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "mgn_cuda: expected x and y of shape (rows, D), but got ", x.dim(),
                  " and ", y.dim(), " dimensions");
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  const bool cosine = mgn::Metric(metric) == mgn::Metric::cosine;
  const Tensor scratch = torch::stable::new_empty(x, {cosine ? 2 * (n + m) : 0}, ScalarType::Double);
  check(mgn::pairwise_distance({feature_type(x.scalar_type()), mgn::Metric(metric), n, m, d,
                                pointer(x, x, x.scalar_type(), n * d), pointer(y, x, x.scalar_type(), m * d),
                                pointer(out, x, wide(x), n * m), static_cast<double*>(scratch.data_ptr())},
                               current_stream(x)));
}

void pairwise_distance_gradient(Tensor x, Tensor y, std::optional<Tensor> dist, Tensor grad, int64_t metric,
                                Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  const bool cosine = mgn::Metric(metric) == mgn::Metric::cosine;
  STD_TORCH_CHECK(dist.has_value() == (mgn::Metric(metric) == mgn::Metric::euclidean),
                  "mgn_cuda: pass dist with the Euclidean distance alone");
  for (const Tensor& matrix : {grad, dist.value_or(grad)})
    STD_TORCH_CHECK(matrix.get_device_index() == x.get_device_index() && matrix.scalar_type() == wide(x) &&
                        matrix.dim() == 2 && matrix.size(0) == n && matrix.size(1) == m,
                    "mgn_cuda: expected dist and grad of shape (", n, ", ", m, "), of the distances' type and device");
  const Tensor scratch = torch::stable::new_empty(x, {cosine ? n + m + n * d : 0}, ScalarType::Double);
  const Tensor& of = dist ? *dist : grad;
  check(mgn::pairwise_distance_gradient(
      {feature_type(x.scalar_type()), mgn::Metric(metric), n, m, d, pointer(x, x, x.scalar_type(), n * d),
       pointer(y, x, x.scalar_type(), m * d), pointer(out, x, x.scalar_type(), n * d),
       static_cast<double*>(scratch.data_ptr())},
      {of.data_ptr(), grad.data_ptr(), {of.stride(0), of.stride(1)}, {grad.stride(0), grad.stride(1)}},
      current_stream(x)));
}

// Why this build cannot run on that device (an architecture that it was not compiled for), or nothing.
std::string unusable(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard{static_cast<int32_t>(device)};
  const cudaError_t error = mgn::batch_hard_loads();
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // reported, so it is reset
  return std::string(cudaGetErrorString(error)) +
         "; mgn._cuda was compiled for " MGN_CUDA_BUILD
         "; set TORCH_CUDA_ARCH_LIST and run pip install --no-build-isolation -e . to compile for this GPU";
}

std::string build() { return MGN_CUDA_BUILD; }
std::string sources() { return MGN_SOURCES; }

}  // namespace

STABLE_TORCH_LIBRARY(mgn_cuda, m) {
  m.def(
      "batch_hard(Tensor anchors, Tensor labels, Tensor? candidates, Tensor? candidate_labels, Tensor(a!) dist_ap, "
      "Tensor(b!) dist_an, Tensor(c!) pos_idx, Tensor(d!) neg_idx, Tensor(e!)? loss, Tensor(f!)? slope, float? margin) "
      "-> bool");
  m.def(
      "batch_hard_backward(Tensor anchors, Tensor? candidates, Tensor dist_ap, Tensor dist_an, Tensor pos_idx, "
      "Tensor neg_idx, Tensor grad_ap, Tensor? grad_an, Tensor? slope, Tensor? entries, Tensor? offsets, "
      "Tensor(a!) grad_anchors, Tensor(b!) grad_candidates) -> ()");
  m.def("canonical_norms(Tensor features, Tensor(a!) norms) -> ()");
  m.def(
      "canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor(a!) keys) -> ()");
  m.def(
      "count_nonmatches(Tensor[] tile, bool cosine, int first, Tensor[] filter_terms, Tensor[] matches, "
      "Tensor[] excluded, Tensor(a!) steps, Tensor(b!) redecided) -> ()");
  m.def("round_to_tf32(Tensor features, Tensor norms, Tensor(a!) rounded, Tensor(b!) residual) -> ()");
  m.def("pairwise_distance(Tensor x, Tensor y, int metric, Tensor(a!) out) -> ()");
  m.def(
      "pairwise_distance_gradient(Tensor x, Tensor y, Tensor? dist, Tensor grad, int metric, Tensor(a!) out) -> ()");
  m.def(
      "select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int first, Tensor(a!) values, "
      "Tensor(b!) items) -> ()");
  m.def("unusable(int device) -> str");
  m.def("build() -> str");
  m.def("sources() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cuda, CUDA, m) {
  m.impl("batch_hard", TORCH_BOX(&batch_hard));
  m.impl("batch_hard_backward", TORCH_BOX(&batch_hard_backward));
  m.impl("canonical_norms", TORCH_BOX(&canonical_norms));
  m.impl("canonical_keys", TORCH_BOX(&canonical_keys));
  m.impl("count_nonmatches", TORCH_BOX(&count_nonmatches));
  m.impl("round_to_tf32", TORCH_BOX(&round_to_tf32));
  m.impl("pairwise_distance_gradient", TORCH_BOX(&pairwise_distance_gradient));
  m.impl("select_nearest", TORCH_BOX(&select_nearest));
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cuda, CompositeExplicitAutograd, m) {
  m.impl("unusable", TORCH_BOX(&unusable));
  m.impl("build", TORCH_BOX(&build));
  m.impl("sources", TORCH_BOX(&sources));
}

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
