// Cases from standard input through the launchers of pairwise_distance_cuda.h, results to standard output; both raw, in
// the order below.
#include "bytes.h"
#include "pairwise_distance_cuda.h"

struct Case {
  int64_t type, metric, n, m, d, transposed, gradient;
};

int main() {
  for (Case c; std::fread(&c, sizeof c, 1, stdin) == 1;) {
    const size_t element[] = {4, 8, 2, 2}, size = element[c.type], result = c.n * c.m * (c.type == 1 ? 8 : 4);
    const size_t of_rows = c.n * c.d * size, scratch_bytes = 16 * (c.n + c.m) + 8 * c.n * c.d;
    const Bytes x = read(of_rows), y = read(c.m * c.d * size);
    const Bytes dist = read(c.gradient ? result : 0), grad = read(c.gradient ? result : 0);
    const Bytes out = poisoned(c.gradient ? of_rows : result);
    const Bytes scratch = poisoned(mgn::Metric(c.metric) == mgn::Metric::cosine ? scratch_bytes : 0);
    const mgn::Pairs pairs = {mgn::FeatureType(c.type), mgn::Metric(c.metric), c.n, c.m, c.d, x.get(), y.get(),
                              out.get(), as<double>(scratch)};
    const int64_t along_n = c.transposed ? 1 : c.m, along_m = c.transposed ? c.n : 1;
    if (c.gradient)
      mgn::pairwise_distance_gradient(pairs, {dist.get(), grad.get(), {along_n, along_m}, {along_n, along_m}}, nullptr);
    else
      mgn::pairwise_distance(pairs, nullptr);
    write(out, c.gradient ? of_rows : result);
    std::fflush(stdout);
  }
}
