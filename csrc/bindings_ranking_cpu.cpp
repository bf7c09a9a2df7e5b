// The module mgn._C, continued: ranking, nearest neighbours and re-ranking.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings_cpu.h"
#include "kernels/nearest_cpu.h"
#include "kernels/ranking_cpu.h"
#include "kernels/reranking_cpu.h"

namespace {

using Tensors = std::vector<Tensor>;

const Tensors& named(const Tensors& list, size_t count, const char* names) {
  STD_TORCH_CHECK(list.size() == count, "mgn_cpu: expected ", count, " tensors (", names, "), but ", list.size(),
                  " were passed");
  return list;
}

mgn::Matches matches_of(const Tensors& matches, const Tensor& steps, int64_t queries) {
  const auto& keys = named(matches, 3, "offsets, keys, items")[1];
  const int64_t m = keys.numel();
  const int64_t* offsets = ids(matches[0], queries + 1, m + 1);
  STD_TORCH_CHECK(std::is_sorted(offsets, offsets + queries + 1), "mgn_cpu: offsets must ascend");
  return {offsets, pointer<double>(keys, m), pointer<int64_t>(matches[2], m), pointer<int64_t>(steps, m)};
}

mgn::Excluded excluded_of(const Tensors& excluded, int64_t queries) {
  const auto &order = named(excluded, 4, "order, begin, end, junk")[0], &junk = excluded[3];
  const int64_t n = order.numel();
  return {pointer<int64_t>(order, n), ids(excluded[1], queries, n + 1), ids(excluded[2], queries, n + 1),
          pointer<int64_t>(junk, junk.numel()), junk.numel()};
}

mgn::Tile tile_of(const Tensors& tile, bool cosine, int64_t first) {
  const auto q = rows(named(tile, 4, "query, gallery, query_norms, gallery_norms")[0]), g = rows(tile[1]);
  STD_TORCH_CHECK(q.d == g.d, "mgn_cpu: query and gallery must have the same width D, but have ", q.d, " and ", g.d);
  return {q, g, pointer<double>(tile[2], q.count), pointer<double>(tile[3], g.count), cosine, first};
}

mgn::Filter filter_of(const Tensors& terms, int64_t queries, int64_t items) {
  const Tensor& dots = named(terms, 6, "dots, item_scale, item_shift, level_scale, level_shift, error")[0];
  const auto of_items = [&](int i) { return pointer<float>(terms[i], items); };
  const auto of_queries = [&](int i) { return pointer<double>(terms[i], queries); };
  mgn::Filter filter = {matrix<float>(dots, queries, items), dots.stride(0), of_items(1), of_items(2)};
  filter.level_scale = of_queries(3), filter.level_shift = of_queries(4), filter.error = of_queries(5);
  return filter;
}

void count(const mgn::Tile& tile, const Tensors& filter_terms, const Tensors& matches, const Tensors& excluded,
           const mgn::Reranked* reranked, const Tensor& steps, const Tensor& redecided, int64_t set) {
  const int64_t queries = tile.query.count;
  *pointer<int64_t>(redecided, 1) += mgn::count_nonmatches(
      tile, filter_of(filter_terms, queries, tile.gallery.count), matches_of(matches, steps, queries),
      excluded_of(excluded, queries), reranked, checked_set(set), parallel);
}

void count_nonmatches(Tensors tile, bool cosine, int64_t first, Tensors filter_terms, Tensors matches, Tensors excluded,
                      Tensor steps, Tensor redecided, int64_t set) {
  count(tile_of(tile, cosine, first), filter_terms, matches, excluded, nullptr, steps, redecided, set);
}

const int32_t* columns(const Tensor& tensor, int64_t count, int64_t below) {
  const int32_t* values = pointer<int32_t>(tensor, count);
  STD_TORCH_CHECK(std::all_of(values, values + count, [&](int32_t i) { return 0 <= i && i < below; }),
                  "mgn_cpu: expected columns from 0 to ", below - 1, ", but some lie outside");
  return values;
}

const int64_t* offsets_of(const Tensor& offsets, int64_t entries) {
  const int64_t n = offsets.numel(), *at = ids(offsets, n, entries + 1);
  STD_TORCH_CHECK(n > 0 && at[0] == 0 && at[n - 1] == entries && std::is_sorted(at, at + n),
                  "mgn_cpu: offsets must ascend");
  return at;
}

mgn::Sparse sparse(const Tensor& offsets, const Tensor& in_columns, const Tensor& values, int64_t width) {
  const int64_t entries = in_columns.numel();
  return {offsets_of(offsets, entries), columns(in_columns, entries, width), pointer<double>(values, entries)};
}

void count_reranked(Tensors tile, bool cosine, int64_t first, Tensors filter_terms, Tensors matches, Tensors excluded,
                    Tensors overlaps, Tensor maxima, double lambda_value, Tensor steps, Tensor redecided, int64_t set) {
  const auto of_tile = tile_of(tile, cosine, first);
  const int64_t queries = of_tile.query.count;
  STD_TORCH_CHECK(named(overlaps, 3, "offsets, items, jaccard")[0].numel() == queries + 1,
                  "mgn_cpu: expected overlaps of ", queries, " queries, but got ", overlaps[0].numel() - 1);
  const int64_t entries = overlaps[1].numel();  // millions, at each tile: items of others are passed over, not refused
  const mgn::Reranked reranked = {offsets_of(overlaps[0], entries), pointer<int32_t>(overlaps[1], entries),
                                  pointer<double>(overlaps[2], entries), pointer<double>(maxima, queries),
                                  lambda_value};
  count(of_tile, filter_terms, matches, excluded, &reranked, steps, redecided, set);
}

int64_t count_in_distances(Tensor distances, Tensors matches, Tensors excluded, Tensor steps, int64_t set) {
  const int64_t queries = distances.size(0), items = distances.size(1);
  return with_type(distances, [&](auto element) {
    using T = decltype(element);
    return mgn::count_in_distances(matrix<T>(distances, queries, items), queries, items, distances.stride(0),
                                   matches_of(matches, steps, queries), excluded_of(excluded, queries),
                                   checked_set(set), parallel);
  });
}

// Items are kept as 32 bits beside their values.
void check_numbers(int64_t items) {
  STD_TORCH_CHECK(items >> 32 == 0, "Neighbours must be among fewer than 2^32 items, not ", items,
                  "; search parts of them one after the other");
}

void select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int64_t first, Tensor values, Tensor items,
                    int64_t set) {
  const int64_t queries = dots.size(0), n = dots.size(1), capacity = values.size(1);
  STD_TORCH_CHECK(capacity > 0, "mgn_cpu: expected room for at least 1 value, found 0");
  check_numbers(first + n);
  const bool by_item = n > 1 && dots.stride(1) != 1;
  const Tensor lines = by_item ? torch::stable::transpose(dots, 0, 1) : dots;
  const mgn::Filter filter = {matrix<float>(lines, lines.size(0), lines.size(1)), lines.stride(0),
                              pointer<float>(item_scale, n), pointer<float>(item_shift, n)};
  mgn::select_nearest(filter, by_item, queries, n, first, capacity, pointer<float>(values, queries * capacity),
                      pointer<int64_t>(items, queries * capacity), checked_set(set), parallel);
}

int64_t nearest_in_distances(Tensor distances, Tensor values, Tensor items, int64_t set) {
  const int64_t queries = distances.size(0), n = distances.size(1), k = values.size(1);
  STD_TORCH_CHECK(k <= n, "mgn_cpu: ", k, " neighbours cannot be chosen from ", n, " columns");
  check_numbers(n);
  return with_type(distances, [&](auto element) {
    using T = decltype(element);
    return mgn::nearest_in_distances(matrix<T>(distances, queries, n), queries, n, distances.stride(0), k,
                                     pointer<T>(values, queries * k), pointer<int64_t>(items, queries * k),
                                     checked_set(set), parallel);
  });
}

template <typename T> Tensor new_tensor(int64_t count, const Tensor& like, T*& data) {
  const Tensor out = torch::stable::new_empty(like, {count}, kType<T>);
  data = static_cast<T*>(out.data_ptr());
  return out;
}
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// Offsets, columns and values, one row after the other. Values that were not made are left as they are in memory.
ThreeTensors as_tensors(mgn::SparseRows rows, const Tensor& like) {
  const int64_t n = rows.columns.size();
  int64_t* at;
  int32_t* to_columns;
  double* to_values;
  const Tensor offsets = new_tensor(n + 1, like, at);
  at[0] = 0;
  for (int64_t row = 0; row < n; ++row) at[row + 1] = at[row] + int64_t(rows.columns[row].size());
  const Tensor columns = new_tensor(at[n], like, to_columns), values = new_tensor(at[n], like, to_values);
  parallel(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::copy(rows.columns[row].begin(), rows.columns[row].end(), to_columns + at[row]);
      std::copy(rows.values[row].begin(), rows.values[row].end(), to_values + at[row]);
      std::vector<int32_t>().swap(rows.columns[row]);
      std::vector<double>().swap(rows.values[row]);
    }
  });
  return {offsets, columns, values};
}

const int64_t* neighbours(const Tensor& items, int64_t below) {
  STD_TORCH_CHECK(items.dim() == 2 && below <= std::numeric_limits<int32_t>::max(),
                  "mgn_cpu: expected items of shape (N, k) with N below 2^31");
  return ids(items, items.numel(), below);
}

std::tuple<Tensor, Tensor> reciprocal(Tensor items, int64_t half) {
  const int64_t n = items.size(0);
  STD_TORCH_CHECK(half >= 0, "mgn_cpu: expected a number of neighbours, but got ", half);
  const auto [offsets, columns, none] =
      as_tensors(mgn::reciprocal(neighbours(items, n), n, items.size(1), half, parallel), items);
  return {offsets, columns};
}

ThreeTensors mean_rows(Tensor offsets, Tensor in_columns, Tensor values, Tensor items) {
  const int64_t n = items.size(0);
  STD_TORCH_CHECK(offsets.numel() == n + 1, "mgn_cpu: expected as many rows of items as sparse rows, but got ", n,
                  " and ", offsets.numel() - 1);
  return as_tensors(
      mgn::mean_rows(sparse(offsets, in_columns, values, n), n, neighbours(items, n), n, items.size(1), parallel),
      items);
}

ThreeTensors transpose(Tensor offsets, Tensor in_columns, Tensor values, int64_t width) {
  STD_TORCH_CHECK(width >= 0, "mgn_cpu: expected a number of columns, but got ", width);
  int64_t* to_offsets;
  int32_t* to_columns;
  double* to_values;
  const int64_t entries = in_columns.numel();
  const ThreeTensors out = {new_tensor(width + 1, offsets, to_offsets), new_tensor(entries, offsets, to_columns),
                            new_tensor(entries, offsets, to_values)};
  mgn::transpose(sparse(offsets, in_columns, values, width), offsets.numel() - 1, width, to_offsets, to_columns,
                 to_values);
  return out;
}

ThreeTensors overlap(Tensor offsets, Tensor in_columns, Tensor values, Tensor column_offsets, Tensor column_rows,
                     Tensor column_values, int64_t items) {
  return as_tensors(mgn::overlap(sparse(offsets, in_columns, values, column_offsets.numel() - 1), offsets.numel() - 1,
                                 sparse(column_offsets, column_rows, column_values, items), items, parallel),
                    offsets);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mgn_cpu, m) {
  m.def(
      "count_nonmatches(Tensor[] tile, bool cosine, int first, Tensor[] filter_terms, Tensor[] matches, "
      "Tensor[] excluded, Tensor(a!) steps, Tensor(b!) redecided, int instruction_set=0) -> ()");
  m.def(
      "count_reranked(Tensor[] tile, bool cosine, int first, Tensor[] filter_terms, Tensor[] matches, "
      "Tensor[] excluded, Tensor[] overlaps, Tensor maxima, float lambda_value, Tensor(a!) steps, "
      "Tensor(b!) redecided, int instruction_set=0) -> ()");
  m.def(
      "count_in_distances(Tensor distances, Tensor[] matches, Tensor[] excluded, Tensor(a!) steps, "
      "int instruction_set=0) -> int");
  m.def(
      "select_nearest(Tensor dots, Tensor item_scale, Tensor item_shift, int first, Tensor(a!) values, "
      "Tensor(b!) items, int instruction_set=0) -> ()");
  m.def("nearest_in_distances(Tensor distances, Tensor(a!) values, Tensor(b!) items, int instruction_set=0) -> int");
  m.def("reciprocal(Tensor items, int half) -> (Tensor, Tensor)");
  m.def("mean_rows(Tensor offsets, Tensor columns, Tensor values, Tensor items) -> (Tensor, Tensor, Tensor)");
  m.def("transpose(Tensor offsets, Tensor columns, Tensor values, int width) -> (Tensor, Tensor, Tensor)");
  m.def(
      "overlap(Tensor offsets, Tensor columns, Tensor values, Tensor column_offsets, Tensor column_rows, "
      "Tensor column_values, int items) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mgn_cpu, CPU, m) {
  m.impl("count_nonmatches", TORCH_BOX(&count_nonmatches));
  m.impl("count_reranked", TORCH_BOX(&count_reranked));
  m.impl("count_in_distances", TORCH_BOX(&count_in_distances));
  m.impl("select_nearest", TORCH_BOX(&select_nearest));
  m.impl("nearest_in_distances", TORCH_BOX(&nearest_in_distances));
  m.impl("reciprocal", TORCH_BOX(&reciprocal));
  m.impl("mean_rows", TORCH_BOX(&mean_rows));
  m.impl("transpose", TORCH_BOX(&transpose));
  m.impl("overlap", TORCH_BOX(&overlap));
}
