// Batch-hard mining on the CPU: squared distances in tiles (squares_cpu.h), mined while they are in the cache.
//
// A task is a block of anchors: it visits the panels of candidates, sums a tile of squared distances, and offers them
// to the best pairs so far. Where the anchors are their own candidates each pair is computed once and offered to both
// its ends.
#include "batch_hard_cpu.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "squares_cpu.h"

namespace mgn {
namespace {

constexpr int32_t kNone = std::numeric_limits<int32_t>::max();  // no partner yet; loses every tie

template <typename T> struct Loops {
  bool (*any_better)(const T* dist2, const int32_t* panel_labels, int32_t label, T best_an, const T* panel_an,
                     bool both);
  void (*pull)(const T* anchor, const T* candidate, T dist, T grad, int64_t from, int64_t to, T* to_anchor,
               T* to_candidate);
};

}  // namespace
}  // namespace mgn

#undef LOOPS
#define LOOPS "batch_hard_loops.h"
#include "each_instruction_set_cpu.h"

namespace mgn {
namespace {

template <typename T> const Loops<T>& loops_of(int instruction_set) {
  static constexpr const Loops<T>* kAll[] = {OF_EACH_INSTRUCTION_SET(kLoops<T>)};
  return *kAll[compiled_instruction_set(instruction_set)];
}

// Any integer labels as 0, 1, …: equal labels stay equal, and are as narrow as a float, so that one mask fits both.
struct DenseLabels {
  std::vector<int32_t> anchors, candidates;  // candidates padded with −1, which no anchor has

  DenseLabels(const int64_t* labels, int64_t n, const int64_t* candidate_labels, int64_t m, int64_t padded)
      : anchors(n), candidates(padded, -1) {
    const bool own = labels == candidate_labels;
    std::vector<int64_t> values(labels, labels + n);
    if (!own) values.insert(values.end(), candidate_labels, candidate_labels + m);
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    const auto rank = [&](int64_t label) {
      return int32_t(std::lower_bound(values.begin(), values.end(), label) - values.begin());
    };
    std::transform(labels, labels + n, anchors.begin(), rank);
    own ? std::copy(anchors.begin(), anchors.end(), candidates.begin())
        : std::transform(candidate_labels, candidate_labels + m, candidates.begin(), rank);
  }
};

template <typename T> bool all_finite(const T* rows, int64_t count, int64_t d, const Parallel& parallel) {
  std::atomic<bool> finite = true;
  parallel(count, grain_of(kGrain, d), [&](int64_t begin, int64_t end) {
    int bad = 0;
    for (int64_t k = begin * d; k < end * d; ++k) bad |= !(std::abs(rows[k]) <= std::numeric_limits<T>::max());
    if (bad) finite = false;
  });
  return finite;
}

// packed: (heads, panels, d, width)
template <typename T> void pack(const Features<T>& x, int width, T* packed, const Parallel& parallel) {
  const int64_t panels = round_up(x.m, width) / width;
  parallel(x.heads * panels, grain_of(kCopyGrain, x.d * width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t head = p / panels, first = p % panels * width;
      pack_panel(x.candidates + (head * x.m + first) * x.d, std::min<int64_t>(width, x.m - first), x.d, x.d, width,
                 packed + p * x.d * width);
    }
  });
}

// The best pairs so far of each anchor of each head, by squared distance. Equal distances: the lower index, so the
// result depends neither on the order of the offers nor on how they were divided among threads.
template <typename T> struct Best {
  std::vector<T> ap, an;
  std::vector<int32_t> pos, neg;

  explicit Best(int64_t size)
      : ap(size, -std::numeric_limits<T>::infinity()), an(size, std::numeric_limits<T>::infinity()), pos(size, kNone),
        neg(size, kNone) {}

  void offer_positive(int64_t anchor, int32_t partner, T dist2) {
    if (dist2 > ap[anchor] || (dist2 == ap[anchor] && partner < pos[anchor])) ap[anchor] = dist2, pos[anchor] = partner;
  }
  void offer_negative(int64_t anchor, int32_t partner, T dist2) {
    if (dist2 < an[anchor] || (dist2 == an[anchor] && partner < neg[anchor])) an[anchor] = dist2, neg[anchor] = partner;
  }
  void offer(int64_t anchor, int32_t partner, T dist2, bool positive) {
    positive ? offer_positive(anchor, partner, dist2) : offer_negative(anchor, partner, dist2);
  }
  void offer_all(const Best& other) {
    for (size_t i = 0; i < ap.size(); ++i) {
      if (other.pos[i] != kNone) offer_positive(i, other.pos[i], other.ap[i]);
      if (other.neg[i] != kNone) offer_negative(i, other.neg[i], other.an[i]);
    }
  }
};

template <typename T>
Best<T> mine(const Features<T>& x, const DenseLabels& labels, const T* packed, const Squares<T>& squares,
             const Loops<T>& loops, const Parallel& parallel) {
  const int width = squares.width;
  const int64_t panels = round_up(x.m, width) / width, rows = std::max(x.n, panels * width);
  const int block = x.n >= 256 ? kBlock : 8;  // a small batch is divided finer, so that every thread has work
  const int64_t blocks = round_up(x.n, block) / block, tasks = (blocks + 1) / 2;

  const auto mine_block = [&](int64_t head, int64_t first, Best<T>& best) {
    const T* anchors = x.anchors + head * x.n * x.d;
    const int64_t last = std::min(first + block, x.n), offset = head * rows;
    alignas(64) T dist2[kBlock * 32];
    for (int64_t panel = x.own ? first / width : 0; panel < panels; ++panel) {
      const T* candidates = packed + (head * panels + panel) * x.d * width;
      // Own candidates: a row meets its own panel and the later ones, so rows behind this panel are left out.
      const int64_t end = x.own ? std::min(last, (panel + 1) * width) : last;
      sum_tile(squares, anchors + first * x.d, end - first, candidates, x.d, dist2);
      const int32_t* panel_labels = labels.candidates.data() + panel * width;
      const int32_t column = int32_t(panel * width);
      for (int64_t i = first; i < end; ++i) {
        const T* row = dist2 + (i - first) * width;
        const bool both = x.own && panel > i / width;
        if (!loops.any_better(row, panel_labels, labels.anchors[i], best.an[offset + i],
                              best.an.data() + offset + column, both))
          continue;
        for (int32_t c = 0; c < width && column + c < x.m; ++c) {
          const bool positive = panel_labels[c] == labels.anchors[i];
          best.offer(offset + i, column + c, row[c], positive);
          if (both) best.offer(offset + column + c, int32_t(i), row[c], positive);
        }
      }
    }
  };

  std::mutex mutex;
  Best<T> best(x.heads * rows);
  const int64_t cost = 2 * block * std::max<int64_t>(x.m * x.d, 1) / (x.own ? 2 : 1);
  parallel(x.heads * tasks, grain_of(kGrain, cost), [&](int64_t begin, int64_t end) {
    Best<T> mine_only(x.heads * rows);
    for (int64_t task = begin; task < end; ++task) {  // a long block and a short one: all tasks cost the same
      const int64_t head = task / tasks, near = task % tasks, far = blocks - 1 - near;
      mine_block(head, near * block, mine_only);
      if (far != near) mine_block(head, far * block, mine_only);
    }
    std::lock_guard<std::mutex> lock(mutex);
    best.offer_all(mine_only);
  });
  return best;
}

// Measures the selected pair directly. If the squares that selected it were out of range, selects again in double.
template <typename T>
void settle(const Features<T>& x, const Squares<T>& squares, int64_t head, int64_t i, const DenseLabels& labels,
            bool positive, T dist2, int32_t partner, T* dist, int64_t* idx) {
  const T* anchor = x.anchors + (head * x.n + i) * x.d;
  const T* candidates = x.candidates + head * x.m * x.d;
  if (partner == kNone) {
    *dist = positive ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
    *idx = -1;
    return;
  }
  double best = distance(squares, anchor, candidates + partner * x.d, x.d);
  const bool duplicate = !positive && best == 0;  // the first candidate at distance 0: none can be nearer or earlier
  if ((dist2 < kTiny<T> || std::isinf(dist2)) && !duplicate) {
    best = positive ? -1 : std::numeric_limits<double>::infinity();
    partner = kNone;
    for (int64_t j = 0; j < x.m; ++j) {
      if ((labels.candidates[j] == labels.anchors[i]) != positive) continue;
      const T* candidate = candidates + j * x.d;
      const double here = std::equal(anchor, anchor + x.d, candidate) ? 0 : distance(squares, anchor, candidate, x.d);
      if (partner == kNone || (positive ? here > best : here < best)) best = here, partner = int32_t(j);
      if (!positive && best == 0) break;
    }
  }
  *dist = T(best);
  *idx = partner;
}

}  // namespace

template <typename T>
bool batch_hard(const Features<T>& x, const int64_t* labels, const int64_t* candidate_labels, const Mined<T>& out,
                int instruction_set, const Parallel& parallel) {
  const Squares<T>& squares = squares_of<T>(instruction_set);
  if (!all_finite(x.anchors, x.heads * x.n, x.d, parallel)) return false;
  if (!x.own && !all_finite(x.candidates, x.heads * x.m, x.d, parallel)) return false;

  const int64_t padded = round_up(x.m, squares.width), rows = std::max(x.n, padded);
  const DenseLabels dense(labels, x.n, candidate_labels, x.m, padded);
  // A few heads at a time: a packed head of few candidates is many times its size.
  const int64_t together = std::min(grain_of(kPacked, padded * x.d), x.heads);
  const Packed<T> packed = room_for_panels<T>(together, padded * x.d);
  for (int64_t first = 0; first < x.heads; first += together) {
    Features<T> part = x;
    part.heads = std::min(together, x.heads - first);
    part.anchors += first * x.n * x.d;
    part.candidates += first * x.m * x.d;
    pack(part, squares.width, packed.get(), parallel);
    const Best<T> best = mine(part, dense, packed.get(), squares, loops_of<T>(instruction_set), parallel);
    parallel(part.heads * x.n, grain_of(kCopyGrain, x.d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row / x.n, i = row % x.n, at = head * rows + i, to = first * x.n + row;
        settle(part, squares, head, i, dense, true, best.ap[at], best.pos[at], out.dist_ap + to, out.pos_idx + to);
        settle(part, squares, head, i, dense, false, best.an[at], best.neg[at], out.dist_an + to, out.neg_idx + to);
      }
    });
  }
  return true;
}

template <typename T>
void triplet_loss(int64_t heads, int64_t n, const Mined<T>& mined, const double* margin, T* loss, T* slope) {
  for (int64_t head = 0; head < heads; ++head, slope += n) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = head * n + i;
      slope[i] = 0;
      if (mined.pos_idx[at] < 0 || mined.neg_idx[at] < 0) continue;
      ++count;
      const double gap = double(mined.dist_ap[at]) - double(mined.dist_an[at]) + (margin ? *margin : 0);
      if (std::isnan(gap)) {
        sum = gap, slope[i] = T(gap);
      } else if (margin) {
        sum += std::max(gap, 0.0), slope[i] = T(gap > 0);
      } else {  // log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|)
        sum += std::max(gap, 0.0) + std::log1p(std::exp(-std::abs(gap)));
        slope[i] = T(1 / (1 + std::exp(-gap)));
      }
    }
    const T share = T(1) / T(std::max<int64_t>(count, 1));
    loss[head] = T(sum / double(std::max<int64_t>(count, 1)));
    for (int64_t i = 0; i < n; ++i) slope[i] *= share;
  }
}

// Each thread owns columns and visits all pairs in one order: no atomics, the same bits for any number of threads.
template <typename T>
void batch_hard_backward(const Features<T>& x, const Mined<T>& mined, const T* grad_ap, const T* grad_an,
                         const T* slope, T* grad_anchors, T* grad_candidates, const Parallel& parallel) {
  const Loops<T>& loops = loops_of<T>(0);
  constexpr int64_t kColumns = 64 / sizeof(T);  // a cache line
  const int64_t slices = round_up(x.d, kColumns) / kColumns;
  const auto backward = [&](int64_t head, int64_t from, int64_t to) {
    T* of_anchors = grad_anchors + head * x.n * x.d;
    T* of_candidates = grad_candidates + head * x.m * x.d;
    for (int64_t i = 0; i < x.n; ++i) std::fill(of_anchors + i * x.d + from, of_anchors + i * x.d + to, T(0));
    for (int64_t j = 0; j < x.m; ++j) std::fill(of_candidates + j * x.d + from, of_candidates + j * x.d + to, T(0));
    for (int64_t i = 0; i < x.n; ++i) {
      const int64_t at = head * x.n + i;
      for (const bool positive : {true, false}) {
        const T dist = positive ? mined.dist_ap[at] : mined.dist_an[at];
        const int64_t partner = positive ? mined.pos_idx[at] : mined.neg_idx[at];
        const T grad = slope ? (positive ? grad_ap[head] * slope[at] : -grad_ap[head] * slope[at])
                             : (positive ? grad_ap : grad_an)[at];
        if (std::isnan(dist)) std::fill(of_anchors + i * x.d + from, of_anchors + i * x.d + to, dist);
        if (partner < 0 || !(dist > 0) || grad == 0) continue;
        loops.pull(x.anchors + at * x.d, x.candidates + (head * x.m + partner) * x.d, dist, grad, from, to,
                   of_anchors + i * x.d, of_candidates + partner * x.d);
      }
    }
  };
  parallel(x.heads * slices, grain_of(kCopyGrain, kColumns * (x.n + x.m)), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // neighbouring slices of one head in one pass
      const int64_t head = begin / slices, stop = std::min(end, (head + 1) * slices);
      backward(head, begin % slices * kColumns, std::min((stop - head * slices) * kColumns, x.d));
      begin = stop;
    }
  });
}

#define INSTANTIATE(T)                                                                                                 \
  template bool batch_hard(const Features<T>&, const int64_t*, const int64_t*, const Mined<T>&, int, const Parallel&); \
  template void triplet_loss(int64_t, int64_t, const Mined<T>&, const double*, T*, T*);                                \
  template void batch_hard_backward(const Features<T>&, const Mined<T>&, const T*, const T*, const T*, T*, T*,         \
                                    const Parallel&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace mgn
