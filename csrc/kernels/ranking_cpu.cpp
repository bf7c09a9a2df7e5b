// Retrieval ranks on the CPU: counting the non-matches that lie nearer than a match.
//
// A query's matches are levels of similarity, each with the margin by which the filter may err. A row of similarities
// is taken in chunks that stay in the first-level cache. Items farther than the farthest match are dropped at once. The
// rest is compared with the levels, from the farthest to the nearest, and thinned out on the way. Items within a margin
// are decided by their keys.
#include "ranking_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "canonical_cpu.h"
#include "reranking_cpu.h"

namespace mgn {
namespace {

constexpr int kChunk = 2048;         // similarities at a time
constexpr int kMany = 256;           // matches from which on searching among them is faster than comparing with each
constexpr int64_t kGrain = 1 << 16;  // elements worth a thread
constexpr int64_t kTogether = 128, kOpen = 1 << 16;  // queries and, about, open pairs that are decided together

template <typename T> struct CountLoops {
  void (*negate)(const T* distances, int n, T* similarity);
  int (*keep)(const T* values, int n, T low, T* kept);
  int (*keep_negated)(const T* values, int n, T low, T* kept);
  void (*count_levels)(const T* values, int n, const T* low, const T* high, int* above, int* open);
  int (*find_open)(const T* values, int n, const T* low, const T* high, int* positions);
};

// For each mask of eight bits, the positions of its ones, then anything.
struct Front {
  uint8_t positions[256][8] = {};
  constexpr Front() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, count = 0; bit < 8; ++bit)
        if (mask >> bit & 1) positions[mask][count++] = uint8_t(bit);
  }
};
constexpr Front kFront;

}  // namespace
}  // namespace mgn

#define LOOPS "ranking_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {
namespace {

template <typename T> const CountLoops<T>& count_loops(int instruction_set) {
  static constexpr const CountLoops<T>* kAll[] = {OF_EACH_INSTRUCTION_SET(kCountLoops<T>)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// Counts along one row of similarities, from chunk to chunk.
template <typename T> struct Counting {
  const CountLoops<T>& loops;
  alignas(64) T similarity[kChunk + 16], kept[kChunk + 16];
  // Of each match, from the nearest to the farthest: between which similarities the filter leaves a pair open, the same
  // without the filter's error, and how many excluded items lie between them (counted for up to kMany matches).
  std::vector<T> low, high;
  std::vector<std::pair<double, double>> levels;
  std::vector<int> excluded_open;
  std::vector<int> positions;
  bool excluded[kChunk] = {};  // of the chunk's items

  explicit Counting(const CountLoops<T>& loops) : loops(loops), positions(2 * kChunk) {}

  // Counts the chunk's n items, of which `left` are in `kept`: those not below the farthest match. On demand fill()
  // writes all similarities. Each open item is counted from the first level that it is above, and passed to
  // visit(position, reached, above): its key may move it to an earlier level, from the first that it may have reached.
  template <typename Fill, typename Visit>
  void count(const Matches& matches, int64_t q, int n, int left, const Fill& fill, const Visit& visit) {
    const int64_t begin = matches.offsets[q], m = matches.offsets[q + 1] - begin;
    if (m > kMany) {
      int open = 0;
      fill();
      for (int j = 0; j < n; ++j) {
        if (similarity[j] < low[m - 1]) continue;
        const int64_t above = first_below(high.data(), m, similarity[j]);
        if (above < m) ++matches.steps[begin + above];
        if (first_reached(low.data(), m, similarity[j]) < above) positions[open++] = j;
      }
      return visit_open(open, m, visit);
    }
    int to_decide = 0;
    for (int64_t end = m; end > 0 && left > 0; end -= std::min<int64_t>(end, 4)) {
      const int64_t from = std::max<int64_t>(end - 4, 0);
      const int group = int(end - from);
      T lows[4], highs[4];
      for (int i = 0; i < 4; ++i)
        lows[i] = low[from + std::min(i, group - 1)], highs[i] = high[from + std::min(i, group - 1)];
      std::fill(kept + left, kept + left + 16, -std::numeric_limits<T>::infinity());
      int above[4], open[4];
      loops.count_levels(kept, left, lows, highs, above, open);
      bool any_open = false;
      for (int i = 0; i < group; ++i) {
        const int64_t level = from + i;
        matches.steps[begin + level] += above[i];
        if (level + 1 < m) matches.steps[begin + level + 1] -= above[i];
        any_open |= open[i] != excluded_open[level];
      }
      if (any_open) {
        if (!to_decide) fill();
        int* const found = positions.data() + to_decide;
        const int within = loops.find_open(similarity, n, lows, highs, found);
        const auto of_nearer = [&](int j) {  // open at a nearer level, too, with which they will be found
          return from > 0 && !(similarity[j] < low[from - 1]) && !(similarity[j] > high[from - 1]);
        };
        to_decide = int(std::remove_if(found, found + within, of_nearer) - positions.data());
      }
      if (from > 0 && above[0] < left / 2) left = loops.keep(kept, left, low[from - 1], kept);
    }
    visit_open(to_decide, m, visit);
  }

  template <typename Visit> void visit_open(int open, int64_t m, const Visit& visit) const {
    for (int p = 0; p < open; ++p)
      if (const int j = positions[p]; !excluded[j])
        visit(j, first_reached(low.data(), m, similarity[j]), first_below(high.data(), m, similarity[j]));
  }
};

// Counts an item, so far from level `above` on, from where its key says.
void decide(const Matches& matches, int64_t q, int64_t reached, int64_t above, double key, int64_t item) {
  const int64_t begin = matches.offsets[q], end = matches.offsets[q + 1];
  const int64_t level = first_behind(matches, begin + reached, begin + above, key, item);
  if (level == begin + above) return;
  ++matches.steps[level];
  if (begin + above < end) --matches.steps[begin + above];
}

// Counts the non-matches of a tile, query by query. One per thread. What many queries leave open is decided item by
// item, so that a row of the gallery is read once for them, and theirs stay in the second-level cache.
struct TileCounting {
  struct Open {
    int64_t q, reached, above;
    int64_t before;  // the item's open pair before this one, or −1
  };
  const Tile& tile;
  const Filter& filter;
  const Matches& matches;
  const Excluded& excluded;
  const Reranked* const reranked;
  const SumLoops& sums;
  Counting<float> counting;
  Keys keys_of;
  std::vector<Open> open = {};
  std::vector<int64_t> last_open = std::vector<int64_t>(tile.gallery.count, -1);  // of each item
  int64_t by_key = 0;  // how many items were decided by their keys

  // Of the query at hand:
  int64_t q = 0, m = 0;  // m matches
  const double* match_keys = nullptr;
  bool known = false;     // whether the filter says anything

  void count_query(int64_t query) {
    q = query;
    m = matches.offsets[q + 1] - matches.offsets[q];
    if (m == 0) return;
    match_keys = matches.keys + matches.offsets[q];
    known = std::isfinite(filter.error[q]);
    set_levels();
    for (int64_t j = 0; j < tile.gallery.count; j += kChunk)
      count_chunk(j, int(std::min<int64_t>(kChunk, tile.gallery.count - j)));
  }

  void decide_open() {
    for (int64_t j = first_open(0), following; j < tile.gallery.count; j = following) {
      following = first_open(j + 1);
      if (following < tile.gallery.count) fetch(tile.gallery[following], tile.gallery.d);
      keys_of.set(tile.gallery[j], tile.gallery_norms[j]);
      for (int64_t next = last_open[j]; next >= 0;) {
        const Open* pairs[2];
        int count = 0;
        for (; next >= 0 && count < 2; next = open[next].before) pairs[count++] = &open[next];
        const int64_t a = pairs[0]->q, b = pairs[count - 1]->q;
        const float* const y[] = {tile.query[a], tile.query[b]};
        const double norms[] = {tile.query_norms[a], tile.query_norms[b]};
        double keys[2];
        keys_of(y, norms, count, keys);
        for (int i = 0; i < count; ++i) {
          const auto& [of, reached, above, before] = *pairs[i];
          const double key = reranked ? final_distance(*reranked, of, tile.cosine, keys[i], 1) : keys[i];
          decide(matches, of, reached, above, key, tile.first + j);
        }
      }
      last_open[j] = -1;
    }
    by_key += open.size();
    open.clear();
  }

 private:
  // The first item from j on that is open.
  int64_t first_open(int64_t j) const {
    while (j < tile.gallery.count && last_open[j] < 0) ++j;
    return j;
  }

  // Between which similarities a pair that ties with a match may lie.
  void set_levels() {
    const double scale = filter.level_scale[q], shift = filter.level_shift[q];
    auto& levels = counting.levels;
    double margin = 0;
    levels.resize(m);
    for (int64_t i = 0; i < m; ++i) {
      const double key = match_keys[i];
      const auto [near, far] = reranked ? keys_of_final(*reranked, q, tile.cosine, key) : std::make_pair(key, key);
      levels[i] = {scale * far + shift, scale * near + shift};
      for (const double level : {levels[i].first, levels[i].second})
        if (std::isfinite(level)) margin = std::max(margin, std::abs(level));
    }
    // The levels' own rounding, and that to float, is added. One margin for all: their ends descend as they do.
    margin = filter.error[q] + (filter.error[q] + margin) * 0x1p-22;
    counting.low.resize(m), counting.high.resize(m);
    for (int64_t i = 0; i < m; ++i) {
      const float infinity = std::numeric_limits<float>::infinity();
      counting.low[i] = known ? float(levels[i].first - margin) : -infinity;
      counting.high[i] = known ? float(levels[i].second + margin) : infinity;
    }
    // Excluded items are set below every level, unless a level reaches there.
    counting.excluded_open.assign(std::min<int64_t>(m, kMany), 0);
  }

  // The n items j, j + 1, … of the tile.
  void count_chunk(int64_t j, int n) {
    sums.affine(filter.dots + q * filter.stride + j, filter.item_scale + j, filter.item_shift + j, n,
                counting.similarity);
    const int64_t first = tile.first + j;
    const auto exclude = [&](int64_t item) {
      counting.similarity[item - first] = -std::numeric_limits<float>::infinity();
      counting.excluded[item - first] = true;
    };
    for_excluded(excluded, q, first, first + n, exclude);
    if (reranked)
      for_overlaps(*reranked, q, first, first + n, [&](int64_t item, double jaccard) {
        count_overlap(j, int(item - first), jaccard);
        exclude(item);
      });
    const int left = counting.loops.keep(counting.similarity, n, counting.low[m - 1], counting.kept);
    counting.count(
        matches, q, n, left, [] {},
        [&](int position, int64_t reached, int64_t above) {
          open.push_back({q, reached, above, std::exchange(last_open[j + position], int64_t(open.size()))});
        });
    std::fill(counting.excluded, counting.excluded + n, false);
  }

  // Counts an item whose encoding overlaps the query's: its similarity bounds its final distance.
  void count_overlap(int64_t j, int position, double jaccard) {
    if (counting.excluded[position]) return;
    const double scale = filter.level_scale[q], key = (counting.similarity[position] - filter.level_shift[q]) / scale;
    const double apart = filter.error[q] / std::abs(scale) + (tile.cosine ? 0x1p-48 : 0);
    const double low = final_distance(*reranked, q, tile.cosine, key - apart, jaccard) - 0x1p-48;
    const double high = final_distance(*reranked, q, tile.cosine, key + apart, jaccard) + 0x1p-48;
    const bool bounded = known && low <= high;
    const int64_t from = bounded ? std::lower_bound(match_keys, match_keys + m, low) - match_keys : 0;
    const int64_t to = bounded ? std::upper_bound(match_keys, match_keys + m, high) - match_keys : m;
    int64_t level = matches.offsets[q] + from;
    if (from < to) {
      const float* const row = tile.gallery[j + position];
      double exact;
      keys_of.set(tile.query[q], tile.query_norms[q]);
      keys_of(&row, tile.gallery_norms + j + position, 1, &exact);
      const double distance = final_distance(*reranked, q, tile.cosine, exact, jaccard);
      level = first_behind(matches, level, matches.offsets[q] + to, distance, tile.first + j + position);
      ++by_key;
    }
    if (level < matches.offsets[q + 1]) ++matches.steps[level];
  }
};

}  // namespace

int64_t count_nonmatches(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded,
                         const Reranked* reranked, int instruction_set, const Parallel& parallel) {
  const SumLoops& sums = sum_loops(instruction_set);
  std::atomic<int64_t> by_key = 0;
  parallel(tile.query.count, 1, [&](int64_t begin, int64_t end) {
    TileCounting counting{tile, filter, matches, excluded, reranked, sums,
                          Counting<float>(count_loops<float>(instruction_set)), {sums, tile.cosine, tile.query.d}};
    for (int64_t q = begin; q < end; ++q) {
      counting.count_query(q);
      if (q % kTogether == 0 || int64_t(counting.open.size()) > kOpen) counting.decide_open();
    }
    counting.decide_open();
    by_key += counting.by_key;
  });
  return by_key;
}

template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel) {
  const CountLoops<T>& loops = count_loops<T>(instruction_set);
  std::atomic<int64_t> nan_query = -1;
  parallel(queries, grain_of(kGrain, items), [&](int64_t begin, int64_t end) {
    Counting<T> counting(loops);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t offset = matches.offsets[q], m = matches.offsets[q + 1] - offset;
      counting.low.resize(m);
      for (int64_t i = 0; i < m; ++i) counting.low[i] = T(-matches.keys[offset + i]);
      counting.high = counting.low;
      for (int64_t j = 0; j < items; j += kChunk) {
        const int n = int(std::min<int64_t>(kChunk, items - j));
        const T* row = distances + q * stride + j;
        const int left =
            loops.keep_negated(row, n, m > 0 ? counting.low[m - 1] : std::numeric_limits<T>::infinity(), counting.kept);
        bool has_nan = false;
        for (int k = 0; k < left; ++k) has_nan |= counting.kept[k] != counting.kept[k];
        if (has_nan) nan_query = q;
        if (m == 0) continue;
        counting.excluded_open.assign(std::min<int64_t>(m, kMany), 0);
        for_excluded(excluded, q, j, j + n,
                     [&](int64_t item) {  // takes back in advance what will be counted for this item
                       counting.excluded[item - j] = true;
                       const T value = -row[item - j];
                       const int64_t above = first_below(counting.high.data(), m, value);
                       if (above < m) --matches.steps[offset + above];
                       for (int64_t i = first_reached(counting.low.data(), m, value); i < above && m <= kMany; ++i)
                         ++counting.excluded_open[i];
                     });
        counting.count(
            matches, q, n, left, [&] { loops.negate(row, n, counting.similarity); },
            [&](int position, int64_t reached, int64_t above) {
              decide(matches, q, reached, above, row[position], j + position);
            });
        std::fill(counting.excluded, counting.excluded + n, false);
      }
    }
  });
  return nan_query;
}

template int64_t count_in_distances(const float*, int64_t, int64_t, int64_t, const Matches&, const Excluded&, int,
                                    const Parallel&);
template int64_t count_in_distances(const double*, int64_t, int64_t, int64_t, const Matches&, const Excluded&, int,
                                    const Parallel&);

}  // namespace mgn
