// Cases from standard input through the launcher of pairwise_distance_cuda.h, results to standard output; both raw, in
// the order below.
#include "bytes.h"
#include "pairwise_distance_cuda.h"

struct Case {
  int64_t type, metric, n, m, d;
};

int main() {
  for (Case c; std::fread(&c, sizeof c, 1, stdin) == 1;) {
    const size_t element[] = {4, 8, 2, 2}, size = element[c.type], result = c.n * c.m * (c.type == 1 ? 8 : 4);
    const Bytes x = read(c.n * c.d * size), y = read(c.m * c.d * size), out = poisoned(result);
    const Bytes scratch = poisoned(mgn::Metric(c.metric) == mgn::Metric::cosine ? 16 * (c.n + c.m) : 0);
    mgn::pairwise_distance({mgn::FeatureType(c.type), mgn::Metric(c.metric), c.n, c.m, c.d, x.get(), y.get(), out.get(),
                            as<double>(scratch)},
                           nullptr);
    write(out, result);
    std::fflush(stdout);
  }
}
