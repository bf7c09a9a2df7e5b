// Retrieval ranks on the CPU: canonical sums, and counting the strangers that lie nearer than a match.
//
// A query's matches are levels of similarity, each with the margin by which the filter may err. A row of similarities is taken
// in chunks that stay in the first cache. What is farther than the farthest match is dropped at once; the rest is compared with
// the levels from the farthest to the nearest, and dropped further on the way. What lies within a margin goes by its key.
#include "ranking_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define KEEP_ROUNDED(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP_ROUNDED(vector) asm("" : "+w"(vector))
#else
#define KEEP_ROUNDED(vector) asm("" : "+m"(vector))
#endif

namespace mgn {
namespace {

constexpr int kChunk = 2048;  // similarities at a time
constexpr int kMany = 256;    // matches from which on searching among them is faster than comparing with each
constexpr int64_t kGrain = 1 << 16;  // elements worth a thread

enum class Term { product, squared_difference, square };

struct SumLoops {
  void (*products)(const double* x, const float* const* y, int64_t d, double* out);
  void (*squared_differences)(const double* x, const float* const* y, int64_t d, double* out);
  void (*squares)(const double*, const float* const* y, int64_t d, double* out);
  void (*widen)(const float* from, int64_t d, double* to);
  void (*affine)(const float* dots, const float* scale, const float* shift, int n, float* similarity);
};

template <typename T>
struct CountLoops {
  void (*negate)(const T* distances, int n, T* similarity);
  int (*keep)(const T* values, int n, T low, T* kept);
  int (*keep_negated)(const T* values, int n, T low, T* kept);
  void (*count_levels)(const T* values, int n, const T* low, const T* high, int* above, int* open);
  int (*find_open)(const T* values, int n, T low, T high, int* positions);
};

// For each mask of eight, the positions of its bits, then any.
struct Front {
  uint8_t of[256][8] = {};
  constexpr Front() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, count = 0; bit < 8; ++bit)
        if (mask >> bit & 1) of[mask][count++] = uint8_t(bit);
  }
};
constexpr Front kFront;

template <typename Mask>
inline __attribute__((always_inline)) bool all_set(const Mask& mask) {
  uint64_t words[sizeof(Mask) / 8], all = ~uint64_t(0);
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all &= word;
  return all == ~uint64_t(0);
}

}  // namespace
}  // namespace mgn

#define LOOPS "ranking_loops.h"
#include "each_instruction_set.h"

namespace mgn {
namespace {

const SumLoops& sum_loops(int instruction_set) {
  static constexpr const SumLoops* kAll[] = {OF_EACH_INSTRUCTION_SET(kSumLoops)};
  return *kAll[compiled_instruction_set(instruction_set)];
}
template <typename T>
const CountLoops<T>& count_loops(int instruction_set) {
  static constexpr const CountLoops<T>* kAll[] = {OF_EACH_INSTRUCTION_SET(kCountLoops<T>)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// Denormals are numbers while it lives, on this thread: flushed to zero they would change sums.
class Denormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();

 public:
  Denormals() { _mm_setcsr(saved & ~0x8040u); }
  ~Denormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;

 public:
  Denormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" : : "r"(saved & ~(uint64_t(1) << 24)));
  }
  ~Denormals() { asm volatile("msr fpcr, %0" : : "r"(saved)); }
#endif
};

// One query and its keys with any rows.
struct Keys {
  const SumLoops& loops;
  const bool cosine;
  const int64_t d;
  std::vector<double> query;  // padded with zeros
  double norm = 0;

  Keys(const SumLoops& loops, bool cosine, int64_t d) : loops(loops), cosine(cosine), d(d), query((d + 15) / 16 * 16) {}

  // y two rows and their norms.
  void operator()(const float* const* y, const double* norms, double* keys) const {
    (cosine ? loops.products : loops.squared_differences)(query.data(), y, d, keys);
    for (int r = 0; r < 2 && cosine; ++r) keys[r] = norm * norms[r] > 0 ? -(keys[r] / (norm * norms[r])) : 0;
  }
};

// Calls what(item) for every excluded item of first … end.
template <typename What>
void for_excluded(const Excluded& excluded, int64_t q, int64_t first, int64_t end, const What& what) {
  const auto all = [&](const int64_t* from, const int64_t* to) {
    for (const int64_t* item = std::lower_bound(from, to, first); item < to && *item < end; ++item) what(*item);
  };
  all(excluded.order + excluded.begin[q], excluded.order + excluded.end[q]);
  all(excluded.junk, excluded.junk + excluded.junk_count);
}

// Counts along one row of similarities, from chunk to chunk.
template <typename T>
struct Counting {
  const CountLoops<T>& loops;
  alignas(64) T similarity[kChunk + 16], kept[kChunk + 16];
  std::vector<T> low, high;  // of each match, from the nearest to the farthest: descending
  std::vector<int> of_excluded;  // how many excluded items lie between the ends of each match's level, of up to kMany
  std::vector<int> positions;
  std::vector<double> keys;

  explicit Counting(const CountLoops<T>& loops) : loops(loops), positions(kChunk), keys(kChunk + 1) {}

  // The chunk's n items first, first + 1, …; `left` of them are kept, those that are not below the farthest match. On demand
  // fill() writes all similarities and keys_of(positions, count, keys) finds keys.
  template <typename Fill, typename KeysOf>
  int64_t count(const Matches& matches, const Excluded& excluded, int64_t q, int64_t first, int n, int left, const Fill& fill,
                const KeysOf& keys_of) {
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
      return decide(matches, excluded, q, first, open, keys_of);
    }
    int64_t by_key = 0;
    bool filled = false;
    for (int64_t end = m; end > 0 && left > 0; end -= std::min<int64_t>(end, 4)) {
      const int64_t from = std::max<int64_t>(end - 4, 0);
      const int group = int(end - from);
      T lows[4], highs[4];
      for (int i = 0; i < 4; ++i) lows[i] = low[from + std::min(i, group - 1)], highs[i] = high[from + std::min(i, group - 1)];
      std::fill(kept + left, kept + left + 16, -std::numeric_limits<T>::infinity());
      int above[4];
      int open[4];
      loops.count_levels(kept, left, lows, highs, above, open);
      for (int i = 0; i < group; ++i) {
        const int64_t level = from + i;
        matches.steps[begin + level] += above[i];
        if (level + 1 < m) matches.steps[begin + level + 1] -= above[i];
        if (open[i] == of_excluded[level]) continue;
        if (!filled) fill(), filled = true;
        const int within = loops.find_open(similarity, n, low[level], high[level], positions.data());
        const auto decided = [&](int j) { return level > 0 && !(similarity[j] < low[level - 1]) && !(similarity[j] > high[level - 1]); };
        const auto rest = std::remove_if(positions.begin(), positions.begin() + within, decided);  // with the level before
        by_key += decide(matches, excluded, q, first, int(rest - positions.begin()), keys_of);
      }
      if (from > 0 && above[0] < left / 2) left = loops.keep(kept, left, low[from - 1], kept);
    }
    return by_key;
  }

  // An open item was counted from the first level that it is above, and belongs to one before it, maybe.
  template <typename KeysOf>
  int64_t decide(const Matches& matches, const Excluded& excluded, int64_t q, int64_t first, int open, const KeysOf& keys_of) {
    const int64_t begin = matches.offsets[q], m = matches.offsets[q + 1] - begin;
    const auto end = std::remove_if(positions.begin(), positions.begin() + open, [&](int j) {
      bool found = false;
      for_excluded(excluded, q, first + j, first + j + 1, [&](int64_t) { found = true; });
      return found;
    });
    const int count = int(end - positions.begin());
    keys_of(positions.data(), count, keys.data());
    for (int p = 0; p < count; ++p) {
      const T value = similarity[positions[p]];
      const int64_t above = first_below(high.data(), m, value), reached = first_reached(low.data(), m, value);
      const int64_t level = first_behind(matches, begin + reached, begin + above, keys[p], first + positions[p]);
      if (level == begin + above) continue;
      ++matches.steps[level];
      if (above < m) --matches.steps[begin + above];
    }
    return count;
  }
};

float round_down(double value) {
  const float nearest = float(value);
  return nearest > value ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

}  // namespace

void canonical_norms(const Rows& rows, double* norms, int instruction_set, const Parallel& parallel) {
  const SumLoops& loops = sum_loops(instruction_set);
  parallel(rows.count, std::max<int64_t>(2, kGrain / std::max<int64_t>(rows.d, 1)), [&](int64_t begin, int64_t end) {
    const Denormals denormals;
    for (int64_t i = begin; i < end; i += 2) {
      const float* const both[] = {rows[i], rows[std::min(i + 1, end - 1)]};
      double squares[2];
      loops.squares(nullptr, both, rows.d, squares);
      for (int64_t r = i; r < std::min(i + 2, end); ++r) norms[r] = std::sqrt(squares[r - i]);
    }
  });
}

void canonical_keys(const Rows& query, const Rows& gallery, const int64_t* queries, const int64_t* items, int64_t pairs, bool cosine,
                    double* keys, int instruction_set, const Parallel& parallel) {
  const SumLoops& loops = sum_loops(instruction_set);
  parallel(pairs, std::max<int64_t>(2, kGrain / std::max<int64_t>(query.d, 1)), [&](int64_t begin, int64_t end) {
    const Denormals denormals;
    Keys keys_of(loops, cosine, query.d);
    for (int64_t p = begin; p < end;) {
      if (p == begin || queries[p] != queries[p - 1]) {
        const float* const row[] = {query[queries[p]], query[queries[p]]};
        double squares[2];
        loops.squares(nullptr, row, query.d, squares);
        keys_of.norm = std::sqrt(squares[0]);
        loops.widen(row[0], query.d, keys_of.query.data());
      }
      const bool two = p + 1 < end && queries[p + 1] == queries[p];
      const float* const y[] = {gallery[items[p]], gallery[items[p + two]]};
      double norms[2], both[2];
      loops.squares(nullptr, y, query.d, norms);
      for (double& norm : norms) norm = std::sqrt(norm);
      keys_of(y, norms, both);
      keys[p] = both[0];
      if (two) keys[p + 1] = both[1];
      p += 1 + two;
    }
  });
}

int64_t count_strangers(const Tile& tile, const Filter& filter, const Matches& matches, const Excluded& excluded, int instruction_set,
                        const Parallel& parallel) {
  const SumLoops& loops = sum_loops(instruction_set);
  std::atomic<int64_t> by_key = 0;
  parallel(tile.query.count, 1, [&](int64_t begin, int64_t end) {
    const Denormals denormals;
    Counting<float> counting(count_loops<float>(instruction_set));
    Keys keys_of(loops, tile.cosine, tile.query.d);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t m = matches.offsets[q + 1] - matches.offsets[q];
      if (m == 0) continue;
      counting.low.resize(m);
      counting.high.resize(m);
      counting.of_excluded.assign(std::min<int64_t>(m, kMany), 0);  // they are set below every level
      const bool known = std::isfinite(filter.error[q]);
      const auto level = [&](int64_t i) { return filter.level_scale[q] * matches.keys[matches.offsets[q] + i] + filter.level_shift[q]; };
      // And what rounds the levels themselves: one margin for all, so that their ends descend as they do.
      const double margin = filter.error[q] + std::max(std::abs(level(0)), std::abs(level(m - 1))) * 0x1p-50;
      for (int64_t i = 0; i < m; ++i) {
        const float infinity = std::numeric_limits<float>::infinity();
        counting.low[i] = known ? round_down(level(i) - margin) : -infinity;
        counting.high[i] = known ? -round_down(-(level(i) + margin)) : infinity;
      }
      bool prepared = false;
      for (int64_t j = 0; j < tile.gallery.count; j += kChunk) {
        const int n = int(std::min<int64_t>(kChunk, tile.gallery.count - j));
        loops.affine(filter.dots + q * filter.stride + j, filter.item_scale + j, filter.item_shift + j, n, counting.similarity);
        const int64_t first = tile.first + j;
        for_excluded(excluded, q, first, first + n, [&](int64_t item) {  // below every level, unless one reaches there
          counting.similarity[item - first] = -std::numeric_limits<float>::infinity();
        });
        const int left = counting.loops.keep(counting.similarity, n, counting.low[m - 1], counting.kept);
        const auto keys_of_items = [&](const int* positions, int count, double* keys) {
          if (!prepared && count) {
            loops.widen(tile.query[q], tile.query.d, keys_of.query.data());
            keys_of.norm = tile.query_norms[q];
            prepared = true;
          }
          for (int p = 0; p < count; p += 2) {
            const int64_t a = j + positions[p], b = j + positions[std::min(p + 1, count - 1)];
            const float* const y[] = {tile.gallery[a], tile.gallery[b]};
            const double norms[] = {tile.gallery_norms[a], tile.gallery_norms[b]};
            keys_of(y, norms, keys + p);
          }
        };
        by_key += counting.count(matches, excluded, q, first, n, left, [] {}, keys_of_items);
      }
    }
  });
  return by_key;
}

template <typename T>
int64_t count_in_distances(const T* distances, int64_t queries, int64_t items, int64_t stride, const Matches& matches,
                           const Excluded& excluded, int instruction_set, const Parallel& parallel) {
  const CountLoops<T>& loops = count_loops<T>(instruction_set);
  std::atomic<int64_t> odd = -1;
  parallel(queries, std::max<int64_t>(1, kGrain / std::max<int64_t>(items, 1)), [&](int64_t begin, int64_t end) {
    const Denormals denormals;
    Counting<T> counting(loops);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t offset = matches.offsets[q], m = matches.offsets[q + 1] - offset;
      counting.low.resize(m);
      for (int64_t i = 0; i < m; ++i) counting.low[i] = T(-matches.keys[offset + i]);
      counting.high = counting.low;
      for (int64_t j = 0; j < items; j += kChunk) {
        const int n = int(std::min<int64_t>(kChunk, items - j));
        const T* row = distances + q * stride + j;
        const int left = loops.keep_negated(row, n, m > 0 ? counting.low[m - 1] : std::numeric_limits<T>::infinity(), counting.kept);
        bool is_odd = false;
        for (int k = 0; k < left; ++k) is_odd |= counting.kept[k] != counting.kept[k];
        if (is_odd) odd = q;
        if (m == 0) continue;
        counting.of_excluded.assign(std::min<int64_t>(m, kMany), 0);
        for_excluded(excluded, q, j, j + n, [&](int64_t item) {  // not to be counted: takes back what will be
          const T value = -row[item - j];
          const int64_t above = first_below(counting.high.data(), m, value);
          if (above < m) --matches.steps[offset + above];
          for (int64_t i = first_reached(counting.low.data(), m, value); i < above && m <= kMany; ++i) ++counting.of_excluded[i];
        });
        counting.count(matches, excluded, q, j, n, left, [&] { loops.negate(row, n, counting.similarity); },
                       [&](const int* positions, int count, double* keys) {
                         for (int p = 0; p < count; ++p) keys[p] = row[positions[p]];
                       });
      }
    }
  });
  return odd;
}

template int64_t count_in_distances(const float*, int64_t, int64_t, int64_t, const Matches&, const Excluded&, int, const Parallel&);
template int64_t count_in_distances(const double*, int64_t, int64_t, int64_t, const Matches&, const Excluded&, int, const Parallel&);

}  // namespace mgn
