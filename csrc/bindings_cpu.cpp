// The module mgn._C: what torch needs to reach the CPU kernels. Callers validate (mgn/ops); here stands only what keeps
// a wrong call from touching memory that is not its own. Outputs come allocated.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/augment_cpu.h"
#include "kernels/batch_hard_cpu.h"
#include "kernels/canonical_cpu.h"
#include "kernels/nearest_cpu.h"
#include "kernels/pairwise_distance_cpu.h"
#include "kernels/ranking_cpu.h"
#include "kernels/reranking_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  torch::stable::parallel_for(0, count, grain, work);
}

template <typename T>
T* pointer(const Tensor& tensor, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == count,
                  "mgn_cpu: want a contiguous CPU tensor of the agreed type with ", count, " elements, got ", tensor.numel(),
                  "; call mgn.ops, which prepares them");
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

template <typename T>
mgn::Features<T> features(const Tensor& anchors, const std::optional<Tensor>& others) {
  const Tensor& candidates = others ? *others : anchors;
  STD_TORCH_CHECK(anchors.dim() == 3 && candidates.dim() == 3, "mgn_cpu: want features of shape (heads, rows, D)");
  const int64_t heads = anchors.size(0), n = anchors.size(1), m = candidates.size(1), d = anchors.size(2);
  return {heads, n, m, d, !others, pointer<T>(anchors, kType<T>, heads * n * d), pointer<T>(candidates, kType<T>, heads * m * d)};
}

template <typename T>
mgn::Mined<T> mined(const Tensor& dist_ap, const Tensor& dist_an, const Tensor& pos_idx, const Tensor& neg_idx, int64_t count) {
  return {pointer<T>(dist_ap, kType<T>, count), pointer<T>(dist_an, kType<T>, count),
          pointer<int64_t>(pos_idx, ScalarType::Long, count), pointer<int64_t>(neg_idx, ScalarType::Long, count)};
}

template <typename T>
bool forward(const Tensor& anchors, const Tensor& labels, const std::optional<Tensor>& candidates,
             const std::optional<Tensor>& candidate_labels, const Tensor& dist_ap, const Tensor& dist_an, const Tensor& pos_idx,
             const Tensor& neg_idx, const std::optional<Tensor>& loss, const std::optional<Tensor>& slope, std::optional<double> margin, int64_t set) {
  STD_TORCH_CHECK(0 <= set && set < mgn::instruction_sets(), "mgn_cpu: no instruction set ", set);
  STD_TORCH_CHECK(!loss == !slope && !candidates == !candidate_labels, "mgn_cpu: want both of a pair of arguments, or neither");
  const auto x = features<T>(anchors, candidates);
  const auto out = mined<T>(dist_ap, dist_an, pos_idx, neg_idx, x.heads * x.n);
  const Tensor& of_candidates = candidate_labels ? *candidate_labels : labels;
  const bool finite = mgn::batch_hard(x, pointer<int64_t>(labels, ScalarType::Long, x.n),
                                      pointer<int64_t>(of_candidates, ScalarType::Long, x.m), out, int(set), parallel);
  if (finite && loss)
    mgn::triplet_loss(x.heads, x.n, out, margin ? &*margin : nullptr, pointer<T>(*loss, kType<T>, x.heads),
                      pointer<T>(*slope, kType<T>, x.heads * x.n));
  return finite;
}

bool batch_hard(Tensor anchors, Tensor labels, std::optional<Tensor> candidates, std::optional<Tensor> candidate_labels,
                Tensor dist_ap, Tensor dist_an, Tensor pos_idx, Tensor neg_idx, std::optional<Tensor> loss,
                std::optional<Tensor> slope, std::optional<double> margin, int64_t set) {
  const auto run = anchors.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(anchors, labels, candidates, candidate_labels, dist_ap, dist_an, pos_idx, neg_idx, loss, slope, margin, set);
}

template <typename T>
void backward(const Tensor& anchors, const std::optional<Tensor>& candidates, const Tensor& dist_ap, const Tensor& dist_an, const Tensor& pos_idx,
              const Tensor& neg_idx, const Tensor& grad_ap, const std::optional<Tensor>& grad_an, const std::optional<Tensor>& slope,
              const Tensor& grad_anchors, const Tensor& grad_candidates) {
  STD_TORCH_CHECK(slope || grad_an, "mgn_cpu: want grad_an or a slope");
  const auto x = features<T>(anchors, candidates);
  const int64_t count = x.heads * x.n;
  const auto pairs = mined<T>(dist_ap, dist_an, pos_idx, neg_idx, count);
  for (const int64_t* idx : {pairs.pos_idx, pairs.neg_idx})
    STD_TORCH_CHECK(std::all_of(idx, idx + count, [&](int64_t j) { return j < x.m; }), "want indices below ", x.m,
                    ", the number of candidates, for the gradient; mined indices were changed in place, change a clone instead");
  mgn::batch_hard_backward(x, pairs,
                           pointer<T>(grad_ap, kType<T>, slope ? x.heads : count),
                           slope ? nullptr : pointer<T>(*grad_an, kType<T>, count),
                           slope ? pointer<T>(*slope, kType<T>, count) : nullptr,
                           pointer<T>(grad_anchors, kType<T>, count * x.d),
                           pointer<T>(grad_candidates, kType<T>, x.heads * x.m * x.d), parallel);
}

void batch_hard_backward(Tensor anchors, std::optional<Tensor> candidates, Tensor dist_ap, Tensor dist_an, Tensor pos_idx, Tensor neg_idx,
                         Tensor grad_ap, std::optional<Tensor> grad_an, std::optional<Tensor> slope, Tensor grad_anchors,
                         Tensor grad_candidates) {
  const auto run = anchors.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx, grad_ap, grad_an, slope, grad_anchors, grad_candidates);
}

mgn::Rows rows(const Tensor& features) {
  STD_TORCH_CHECK(features.is_cpu() && features.dim() == 2 && features.scalar_type() == ScalarType::Float &&
                      (features.size(1) <= 1 || features.stride(1) == 1),
                  "mgn_cpu: want CPU features (n, D) of float32, contiguous along D; call mgn.ops, which prepares them");
  return {static_cast<const float*>(features.data_ptr()), features.size(0), features.size(1), features.stride(0)};
}

void canonical_norms(Tensor features, Tensor norms, int64_t set) {
  const auto x = rows(features);
  mgn::canonical_norms(x, pointer<double>(norms, ScalarType::Double, x.count), int(set), parallel);
}

const int64_t* ids(const Tensor& tensor, int64_t count, int64_t below) {
  const int64_t* values = pointer<int64_t>(tensor, ScalarType::Long, count);
  STD_TORCH_CHECK(std::all_of(values, values + count, [&](int64_t i) { return 0 <= i && i < below; }), "mgn_cpu: want indices below ", below);
  return values;
}

void canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor keys, int64_t set) {
  const auto q = rows(query), g = rows(gallery);
  const int64_t pairs = keys.numel();
  STD_TORCH_CHECK(q.d == g.d, "mgn_cpu: want query and gallery of one width");
  mgn::canonical_keys(q, g, ids(queries, pairs, q.count), ids(items, pairs, g.count), pairs, cosine,
                      pointer<double>(keys, ScalarType::Double, pairs), int(set), parallel);
}

using Tensors = std::vector<Tensor>;

const Tensors& named(const Tensors& list, size_t count, const char* names) {
  STD_TORCH_CHECK(list.size() == count, "mgn_cpu: expected ", count, " tensors (", names, "), but ", list.size(), " were passed");
  return list;
}

mgn::Matches matches_of(const Tensors& matches, const Tensor& steps, int64_t queries) {
  const auto& keys = named(matches, 3, "offsets, keys, items")[1];
  const int64_t m = keys.numel();
  const int64_t* offsets = ids(matches[0], queries + 1, m + 1);
  STD_TORCH_CHECK(std::is_sorted(offsets, offsets + queries + 1), "mgn_cpu: want ascending offsets");
  return {offsets, pointer<double>(keys, ScalarType::Double, m), pointer<int64_t>(matches[2], ScalarType::Long, m),
          pointer<int64_t>(steps, ScalarType::Long, m)};
}

mgn::Excluded excluded_of(const Tensors& excluded, int64_t queries) {
  const auto &order = named(excluded, 4, "order, begin, end, junk")[0], &junk = excluded[3];
  const int64_t n = order.numel();
  return {pointer<int64_t>(order, ScalarType::Long, n), ids(excluded[1], queries, n + 1), ids(excluded[2], queries, n + 1),
          pointer<int64_t>(junk, ScalarType::Long, junk.numel()), junk.numel()};
}

template <typename T>
int64_t matrix_stride(const Tensor& matrix, int64_t queries, int64_t items) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2 && matrix.size(0) == queries && matrix.size(1) == items &&
                      matrix.scalar_type() == kType<T> && (items <= 1 || matrix.stride(1) == 1),
                  "mgn_cpu: want a CPU matrix (", queries, ", ", items, ") of the agreed type, contiguous along its rows");
  return matrix.stride(0);
}

mgn::Tile tile_of(const Tensors& tile, bool cosine, int64_t first) {
  const auto q = rows(named(tile, 4, "query, gallery, query_norms, gallery_norms")[0]), g = rows(tile[1]);
  STD_TORCH_CHECK(q.d == g.d, "mgn_cpu: want query and gallery of one width");
  return {q, g, pointer<double>(tile[2], ScalarType::Double, q.count), pointer<double>(tile[3], ScalarType::Double, g.count), cosine, first};
}

mgn::Filter filter_of(const Tensors& terms, int64_t queries, int64_t items) {
  const Tensor& dots = named(terms, 6, "dots, item_scale, item_shift, level_scale, level_shift, error")[0];
  const auto of_items = [&](int i) { return pointer<float>(terms[i], ScalarType::Float, items); };
  const auto of_queries = [&](int i) { return pointer<double>(terms[i], ScalarType::Double, queries); };
  return {static_cast<const float*>(dots.data_ptr()), matrix_stride<float>(dots, queries, items),
          of_items(1), of_items(2), of_queries(3), of_queries(4), of_queries(5)};
}

void count(const mgn::Tile& tile, const Tensors& filter_terms, const Tensors& matches, const Tensors& excluded, const mgn::Reranked* reranked,
           const Tensor& steps, const Tensor& redecided, int64_t set) {
  const int64_t queries = tile.query.count;
  *pointer<int64_t>(redecided, ScalarType::Long, 1) +=
      mgn::count_nonmatches(tile, filter_of(filter_terms, queries, tile.gallery.count), matches_of(matches, steps, queries),
                            excluded_of(excluded, queries), reranked, int(set), parallel);
}

void count_nonmatches(Tensors tile, bool cosine, int64_t first, Tensors filter_terms, Tensors matches, Tensors excluded, Tensor steps,
                      Tensor redecided, int64_t set) {
  count(tile_of(tile, cosine, first), filter_terms, matches, excluded, nullptr, steps, redecided, set);
}

const int32_t* columns(const Tensor& tensor, int64_t count, int64_t below) {
  const int32_t* values = pointer<int32_t>(tensor, ScalarType::Int, count);
  STD_TORCH_CHECK(std::all_of(values, values + count, [&](int32_t i) { return 0 <= i && i < below; }), "mgn_cpu: want columns below ", below);
  return values;
}

mgn::Sparse sparse(const Tensor& offsets, const Tensor& in_columns, const Tensor& values, int64_t width) {
  const int64_t n = offsets.numel(), entries = in_columns.numel();
  const int64_t* of = ids(offsets, n, entries + 1);
  STD_TORCH_CHECK(n > 0 && of[0] == 0 && of[n - 1] == entries && std::is_sorted(of, of + n), "mgn_cpu: want ascending offsets");
  return {of, columns(in_columns, entries, width), pointer<double>(values, ScalarType::Double, entries)};
}

void count_reranked(Tensors tile, bool cosine, int64_t first, Tensors filter_terms, Tensors matches, Tensors excluded, Tensors overlaps,
                    Tensor maxima, double lambda_value, Tensor steps, Tensor redecided, int64_t set) {
  const auto of_tile = tile_of(tile, cosine, first);
  const int64_t queries = of_tile.query.count;
  STD_TORCH_CHECK(named(overlaps, 3, "offsets, items, jaccard")[0].numel() == queries + 1, "mgn_cpu: want overlaps of every query");
  const auto rows = sparse(overlaps[0], overlaps[1], overlaps[2], std::numeric_limits<int32_t>::max());
  const mgn::Reranked reranked = {rows.offsets, rows.columns, rows.values, pointer<double>(maxima, ScalarType::Double, queries), lambda_value};
  count(of_tile, filter_terms, matches, excluded, &reranked, steps, redecided, set);
}

template <typename T>
int64_t count_typed(const Tensor& distances, const Tensors& matches, const Tensors& excluded, const Tensor& steps, int64_t set) {
  const int64_t queries = distances.size(0), n = distances.size(1), stride = matrix_stride<T>(distances, queries, n);
  return mgn::count_in_distances(static_cast<const T*>(distances.data_ptr()), queries, n, stride, matches_of(matches, steps, queries),
                                 excluded_of(excluded, queries), int(set), parallel);
}
int64_t count_in_distances(Tensor distances, Tensors matches, Tensors excluded, Tensor steps, int64_t set) {
  const auto run = distances.scalar_type() == ScalarType::Double ? count_typed<double> : count_typed<float>;
  return run(distances, matches, excluded, steps, set);
}

void select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int64_t first, Tensor values, Tensor items, int64_t set) {
  const int64_t queries = dots.size(0), n = dots.size(1), capacity = values.size(1);
  const mgn::Filter filter = {static_cast<const float*>(dots.data_ptr()), matrix_stride<float>(dots, queries, n),
                              pointer<float>(item_scale, ScalarType::Float, n), pointer<float>(item_shift, ScalarType::Float, n),
                              nullptr, nullptr, nullptr};
  mgn::select_nearest(filter, queries, n, first, capacity, pointer<float>(values, ScalarType::Float, queries * capacity),
                      pointer<int64_t>(items, ScalarType::Long, queries * capacity), int(set), parallel);
}

template <typename T>
int64_t nearest_typed(const Tensor& distances, const Tensor& values, const Tensor& items, int64_t set) {
  const int64_t queries = distances.size(0), n = distances.size(1), k = values.size(1), stride = matrix_stride<T>(distances, queries, n);
  STD_TORCH_CHECK(k <= n, "mgn_cpu: want no more neighbours than columns");
  return mgn::nearest_in_distances(static_cast<const T*>(distances.data_ptr()), queries, n, stride, k, pointer<T>(values, kType<T>, queries * k),
                                   pointer<int64_t>(items, ScalarType::Long, queries * k), int(set), parallel);
}
int64_t nearest_in_distances(Tensor distances, Tensor values, Tensor items, int64_t set) {
  return (distances.scalar_type() == ScalarType::Double ? nearest_typed<double> : nearest_typed<float>)(distances, values, items, set);
}

template <typename T>
Tensor as_tensor(const std::vector<T>& values, const Tensor& like, ScalarType type) {
  const Tensor out = torch::stable::new_empty(like, {int64_t(values.size())}, type);
  std::copy(values.begin(), values.end(), static_cast<T*>(out.data_ptr()));
  return out;
}
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
ThreeTensors as_tensors(const mgn::SparseRows& rows, const Tensor& like) {
  return {as_tensor(rows.offsets, like, ScalarType::Long), as_tensor(rows.columns, like, ScalarType::Int),
          as_tensor(rows.values, like, ScalarType::Double)};
}

const int64_t* neighbours(const Tensor& items, int64_t below) {
  STD_TORCH_CHECK(items.dim() == 2 && below <= std::numeric_limits<int32_t>::max(), "mgn_cpu: want items (N, k), of fewer than 2^31");
  return ids(items, items.numel(), below);
}

std::tuple<Tensor, Tensor> reciprocal(Tensor items, int64_t half) {
  const auto rows = mgn::reciprocal(neighbours(items, items.size(0)), items.size(0), items.size(1), half, parallel);
  return {as_tensor(rows.offsets, items, ScalarType::Long), as_tensor(rows.columns, items, ScalarType::Int)};
}

ThreeTensors mean_rows(Tensor offsets, Tensor in_columns, Tensor values, Tensor items) {
  const int64_t n = items.size(0);
  STD_TORCH_CHECK(offsets.numel() == n + 1, "mgn_cpu: want a row of items for each sparse row");
  return as_tensors(mgn::mean_rows(sparse(offsets, in_columns, values, n), n, neighbours(items, n), n, items.size(1), parallel), items);
}

ThreeTensors transpose(Tensor offsets, Tensor in_columns, Tensor values, int64_t width) {
  return as_tensors(mgn::transpose(sparse(offsets, in_columns, values, width), offsets.numel() - 1, width), offsets);
}

ThreeTensors overlap(Tensor offsets, Tensor in_columns, Tensor values, Tensor column_offsets, Tensor column_rows, Tensor column_values,
                     int64_t items) {
  return as_tensors(mgn::overlap(sparse(offsets, in_columns, values, column_offsets.numel() - 1), offsets.numel() - 1,
                                 sparse(column_offsets, column_rows, column_values, items), items, parallel), offsets);
}

template <typename T>
void pairs(const Tensor& x, const Tensor& y, int64_t metric, const Tensor& out, int64_t set) {
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  mgn::pairwise_distance(pointer<T>(x, kType<T>, n * d), pointer<T>(y, kType<T>, m * d), n, m, d, mgn::Metric(metric),
                         pointer<T>(out, kType<T>, n * m), int(set), parallel);
}

void pairwise_distance(Tensor x, Tensor y, int64_t metric, Tensor out, int64_t set) {
  STD_TORCH_CHECK(0 <= set && set < mgn::instruction_sets(), "mgn_cpu: no instruction set ", set);
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "mgn_cpu: want rows of shape (rows, D)");
  (x.scalar_type() == ScalarType::Double ? pairs<double> : pairs<float>)(x, y, metric, out, set);
}

void augment(Tensor images, Tensor flip, Tensor top, Tensor left, Tensor erase, int64_t padding, Tensor mean, Tensor deviation, Tensor out,
             int64_t set) {
  STD_TORCH_CHECK(0 <= set && set < mgn::instruction_sets(), "mgn_cpu: no instruction set ", set);
  STD_TORCH_CHECK(images.dim() == 4 && images.size(3) == 3 && 0 <= padding && padding < (int64_t(1) << 31),
                  "mgn_cpu: want images of shape (B, H, W, 3) and a padding of 31 bits");
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2), row = 3 * width;
  const mgn::Images in = {pointer<uint8_t>(images, ScalarType::Byte, count * height * row), count, height, width};
  const mgn::Draws draws = {pointer<bool>(flip, ScalarType::Bool, count), ids(top, count, 2 * padding + 1), ids(left, count, 2 * padding + 1),
                            pointer<int64_t>(erase, ScalarType::Long, 4 * count), padding};
  mgn::augment(in, draws, pointer<float>(mean, ScalarType::Float, row), pointer<float>(deviation, ScalarType::Float, row),
               pointer<float>(out, ScalarType::Float, count * height * row), int(set), parallel);
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
      "batch_hard_backward(Tensor anchors, Tensor? candidates, Tensor dist_ap, Tensor dist_an, Tensor pos_idx, Tensor neg_idx, "
      "Tensor grad_ap, Tensor? grad_an, Tensor? slope, Tensor(a!) grad_anchors, Tensor(b!) grad_candidates) -> ()");
  m.def("canonical_norms(Tensor features, Tensor(a!) norms, int instruction_set=0) -> ()");
  m.def("canonical_keys(Tensor query, Tensor gallery, Tensor queries, Tensor items, bool cosine, Tensor(a!) keys, int instruction_set=0) -> ()");
  m.def(
      "count_nonmatches(Tensor[] tile, bool cosine, int first, Tensor[] filter_terms, Tensor[] matches, Tensor[] excluded, Tensor(a!) steps, "
      "Tensor(b!) redecided, int instruction_set=0) -> ()");
  m.def(
      "count_reranked(Tensor[] tile, bool cosine, int first, Tensor[] filter_terms, Tensor[] matches, Tensor[] excluded, Tensor[] overlaps, "
      "Tensor maxima, float lambda_value, Tensor(a!) steps, Tensor(b!) redecided, int instruction_set=0) -> ()");
  m.def(
      "count_in_distances(Tensor distances, Tensor[] matches, Tensor[] excluded, Tensor(a!) steps, int instruction_set=0) -> int");
  m.def("select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int first, Tensor(a!) values, Tensor(b!) items, int instruction_set=0) -> ()");
  m.def("nearest_in_distances(Tensor distances, Tensor(a!) values, Tensor(b!) items, int instruction_set=0) -> int");
  m.def("reciprocal(Tensor items, int half) -> (Tensor, Tensor)");
  m.def("mean_rows(Tensor offsets, Tensor columns, Tensor values, Tensor items) -> (Tensor, Tensor, Tensor)");
  m.def("transpose(Tensor offsets, Tensor columns, Tensor values, int width) -> (Tensor, Tensor, Tensor)");
  m.def(
      "overlap(Tensor offsets, Tensor columns, Tensor values, Tensor column_offsets, Tensor column_rows, Tensor column_values, int items) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("pairwise_distance(Tensor x, Tensor y, int metric, Tensor(a!) out, int instruction_set=0) -> ()");
  m.def(
      "augment(Tensor images, Tensor flip, Tensor top, Tensor left, Tensor erase, int padding, Tensor mean, Tensor deviation, Tensor(a!) out, "
      "int instruction_set=0) -> ()");
  m.def("instruction_sets() -> str");
  m.def("cuda_module() -> str");
  m.def("sources() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CPU, m) {
  m.impl("batch_hard", TORCH_BOX(&batch_hard));
  m.impl("batch_hard_backward", TORCH_BOX(&batch_hard_backward));
  m.impl("canonical_norms", TORCH_BOX(&canonical_norms));
  m.impl("canonical_keys", TORCH_BOX(&canonical_keys));
  m.impl("count_nonmatches", TORCH_BOX(&count_nonmatches));
  m.impl("count_in_distances", TORCH_BOX(&count_in_distances));
  m.impl("count_reranked", TORCH_BOX(&count_reranked));
  m.impl("select_nearest", TORCH_BOX(&select_nearest));
  m.impl("nearest_in_distances", TORCH_BOX(&nearest_in_distances));
  m.impl("reciprocal", TORCH_BOX(&reciprocal));
  m.impl("mean_rows", TORCH_BOX(&mean_rows));
  m.impl("transpose", TORCH_BOX(&transpose));
  m.impl("overlap", TORCH_BOX(&overlap));
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("augment", TORCH_BOX(&augment));
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
