// Calls from standard input to the launchers of ranking_cuda.h and nearest_cuda.h, results to standard output. A call:
// its number, how many integers and arrays, the integers, each array's size in bytes and content. The answer: the
// arrays it may change.
#include "bytes.h"
#include "nearest_cuda.h"
#include "ranking_cuda.h"

#include <vector>

namespace {

struct Call {
  std::vector<int64_t> integers;
  std::vector<Bytes> arrays;
  std::vector<int64_t> sizes;
  size_t integer = 0, array = 0;

  int64_t next_integer() { return integers.at(integer++); }
  template <typename T>
  T* next() {
    return as<T>(arrays.at(array++));
  }
  mgn::Rows rows() {
    const int64_t count = next_integer(), d = next_integer(), stride = next_integer();
    return {next<float>(), count, d, stride};
  }
  void answer(size_t number) { write(arrays.at(number), sizes.at(number)); }
};

void norms(Call& c) {
  const auto rows = c.rows();
  mgn::canonical_norms(rows, c.next<double>(), nullptr);
  c.answer(1);
}

void keys(Call& c) {
  const auto query = c.rows(), gallery = c.rows();
  const auto *queries = c.next<int64_t>(), *items = c.next<int64_t>();
  const int64_t pairs = c.next_integer();
  mgn::canonical_keys(query, gallery, queries, items, pairs, c.next_integer(), c.next<double>(), nullptr);
  c.answer(4);
}

void count(Call& c) {
  const auto query = c.rows(), gallery = c.rows();
  const auto *query_norms = c.next<double>(), *gallery_norms = c.next<double>();
  const bool cosine = c.next_integer();
  const mgn::Tile tile = {query, gallery, query_norms, gallery_norms, cosine, c.next_integer()};
  const float *dots = c.next<float>(), *item_scale = c.next<float>(), *item_shift = c.next<float>();
  const double *level_scale = c.next<double>(), *level_shift = c.next<double>(), *error = c.next<double>();
  const auto* offsets = c.next<int64_t>();
  const auto* of_matches = c.next<double>();
  const auto* items = c.next<int64_t>();
  auto* steps = c.next<int64_t>();
  const auto *order = c.next<int64_t>(), *begin = c.next<int64_t>(), *end = c.next<int64_t>(),
             *junk = c.next<int64_t>();
  auto* redecided = c.next<int64_t>();
  const int64_t junk_count = c.next_integer(), matches = c.next_integer();
  const Bytes low = poisoned(4 * matches), high = poisoned(4 * matches),
              open = poisoned(8 * query.count * gallery.count), open_count = poisoned(4);
  mgn::count_nonmatches(tile, {dots, gallery.count, item_scale, item_shift, level_scale, level_shift, error},
                        {offsets, of_matches, items, steps}, {order, begin, end, junk, junk_count},
                        {as<float>(low), as<float>(high), as<int64_t>(open), as<int>(open_count)}, redecided, nullptr);
  c.answer(13);
  c.answer(18);
}

void round(Call& c) {
  const auto rows = c.rows();
  const auto* norms = c.next<double>();
  auto* rounded = c.next<float>();
  mgn::round_to_tf32(rows, norms, rounded, c.next<double>(), nullptr);
  c.answer(2);
  c.answer(3);
}

void nearest(Call& c) {
  const int64_t queries = c.next_integer(), items = c.next_integer(), first = c.next_integer(),
                capacity = c.next_integer();
  const float *dots = c.next<float>(), *item_scale = c.next<float>(), *item_shift = c.next<float>();
  const Bytes scratch = poisoned(8 * queries * mgn::nearest_scratch(capacity));
  auto* values = c.next<float>();
  mgn::select_nearest({dots, items, item_scale, item_shift}, queries, items, first,
                      {capacity, values, c.next<int64_t>(), as<unsigned long long>(scratch)}, nullptr);
  c.answer(3);
  c.answer(4);
}

}  // namespace

int main() {
  for (int64_t head[3]; std::fread(head, sizeof head, 1, stdin) == 1;) {
    Call call;
    for (int64_t i = 0; i < head[1]; ++i) call.integers.push_back(*as<int64_t>(read(8)));
    for (int64_t i = 0; i < head[2]; ++i) {
      call.sizes.push_back(*as<int64_t>(read(8)));
      call.arrays.push_back(read(call.sizes.back()));
    }
    constexpr void (*kCalls[])(Call&) = {norms, keys, count, nearest, round};
    kCalls[head[0]](call);
    std::fflush(stdout);
  }
}
