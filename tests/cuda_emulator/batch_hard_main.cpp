// Cases from standard input through the launchers of batch_hard_cuda.h, results to standard output; both raw, in the
// order below.
#include "batch_hard_cuda.h"
#include "bytes.h"

namespace {

struct Case {
  int64_t type, heads, n, m, d, own, with_loss, soft, with_entries, anchors_of_block, parts;
  double margin;
};

void run(const Case& c) {
  const size_t element[] = {4, 8, 2, 2}, size = element[c.type], wide = c.type == 1 ? 8 : 4;
  const size_t rows = c.heads * c.n, anchor_bytes = rows * c.d * size, candidate_bytes = c.heads * c.m * c.d * size;
  const Bytes anchors = read(anchor_bytes), candidates = read(c.own ? 0 : candidate_bytes);
  const Bytes labels = read(c.n * 8), candidate_labels = read(c.own ? 0 : c.m * 8);
  const Bytes dist_ap = poisoned(rows * wide), dist_an = poisoned(rows * wide), pos_idx = poisoned(rows * 8),
              neg_idx = poisoned(rows * 8);
  const Bytes loss = poisoned(c.heads * wide), slope = poisoned(rows * wide);
  const mgn::BatchHard mining = {
      mgn::FeatureType(c.type), c.heads, c.n, c.m, c.d, bool(c.own), anchors.get(),
      c.own ? anchors.get() : candidates.get(), dist_ap.get(), dist_an.get(), as<int64_t>(pos_idx),
      as<int64_t>(neg_idx)};
  const mgn::TripletLoss triplet = {c.with_loss ? loss.get() : nullptr, slope.get(), bool(c.soft), c.margin};
  const auto plan = mgn::plan_mining(mining, 132, int(c.anchors_of_block), c.parts);
  const Bytes scratch = poisoned(plan.scratch_bytes);
  mgn::batch_hard_forward(mining, as<int64_t>(labels), as<int64_t>(c.own ? labels : candidate_labels), triplet,
                          plan, scratch.get(), nullptr);
  write(dist_ap, rows * wide);
  write(dist_an, rows * wide);
  write(pos_idx, rows * 8);
  write(neg_idx, rows * 8);
  if (c.with_loss) {
    write(loss, c.heads * wide);
    write(slope, rows * wide);
  }

  std::fflush(stdout);  // the caller sorts the pairs by candidate, if it wants them sorted
  const Bytes grad_ap = read((c.with_loss ? c.heads : rows) * wide), grad_an = read(c.with_loss ? 0 : rows * wide);
  const Bytes entries = read(c.with_entries ? 2 * rows * 8 : 0),
              offsets = read(c.with_entries ? c.heads * (c.m + 1) * 8 : 0);
  const Bytes grad_anchors = poisoned(anchor_bytes), grad_candidates = poisoned(candidate_bytes);
  mgn::batch_hard_backward(mining,
                           {grad_ap.get(), c.with_loss ? nullptr : grad_an.get(), c.with_loss ? slope.get() : nullptr,
                            c.with_entries ? as<int64_t>(entries) : nullptr,
                            c.with_entries ? as<int64_t>(offsets) : nullptr, grad_anchors.get(), grad_candidates.get()},
                           nullptr);
  write(grad_anchors, anchor_bytes);
  if (!c.own) write(grad_candidates, candidate_bytes);
  std::fflush(stdout);
}

}  // namespace

// With arguments (heads, anchors, candidates, multiprocessors) it prints how mining is shared out.
int main(int count, char** arguments) {
  if (count == 5) {
    mgn::BatchHard mining = {};
    mining.heads = std::atoi(arguments[1]), mining.n = std::atoi(arguments[2]), mining.m = std::atoi(arguments[3]);
    const auto plan = mgn::plan_mining(mining, std::atoi(arguments[4]));
    std::printf("%d %d %d\n", plan.anchors, int(plan.tiles), int(plan.parts));
    return 0;
  }
  if (mgn::batch_hard_loads()) return 1;
  for (Case c; std::fread(&c, sizeof c, 1, stdin) == 1;) run(c);
}
