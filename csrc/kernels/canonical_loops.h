// The inner loops of canonical sums, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

// Canonical sums, in double: element i goes to sum i mod 16, ascending; then sum j takes j + 8, j + 4, j + 2, j + 1.
typedef double Wide __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kWideLanes = VECTOR_BYTES / 8, kSums = 16 / kWideLanes;
typedef float Narrow __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4)));

TARGET inline Wide widen(const float* from) {
#if VECTOR_BYTES == 64
  return Wide(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from)));  // gcc by itself converts the halves one by one
#else
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Wide);
#endif
}

template <Term term, int rows>
TARGET inline void add_sixteen(const float* x, const float* const* y, int64_t k, Wide (*sums)[kSums]) {
#pragma GCC unroll 8
  for (int part = 0; part < kSums; ++part) {
    Wide from_x = {};
    if (term != Term::square) from_x = widen(x + k + part * kWideLanes);
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const Wide from_y = widen(y[r] + k + part * kWideLanes);
      Wide value = term == Term::square ? from_y * from_y : term == Term::product ? from_x * from_y : from_x - from_y;
      if (term == Term::squared_difference) {
        value *= value;
        KEEP_ROUNDED(value);  // a fused multiply-add would not round it; products of two floats are exact
      }
      sums[r][part] += value;
    }
  }
}

template <Term term, int rows>
TARGET inline void sums_of(const float* x, const float* const* y, int64_t d, double* out) {
  Wide sums[rows][kSums] = {};
  int64_t k = 0;
  for (; k + 16 <= d; k += 16) add_sixteen<term, rows>(x, y, k, sums);
  if (k < d) {
    float padded[rows + 1][16] = {};
    const float* tail[rows];
    for (int r = 0; r < rows; ++r) tail[r] = static_cast<float*>(__builtin_memcpy(padded[r], y[r] + k, (d - k) * 4));
    if (term != Term::square) __builtin_memcpy(padded[rows], x + k, (d - k) * 4);
    add_sixteen<term, rows>(padded[rows], tail, 0, sums);
  }
  for (int r = 0; r < rows; ++r) {
    double single[16];
    __builtin_memcpy(single, sums[r], sizeof single);
    for (int half = 8; half; half /= 2)
      for (int j = 0; j < half; ++j) single[j] += single[j + half];
    out[r] = single[0];
  }
}

// Sums of one row y or two, each with x, which is not read for Term::square.
template <Term term>
TARGET void canonical_sums(const float* x, const float* const* y, int rows, int64_t d, double* out) {
  rows == 1 ? sums_of<term, 1>(x, y, d, out) : sums_of<term, 2>(x, y, d, out);
}

TARGET void affine(const float* dots, const float* scale, const float* shift, int n, float* similarity) {
  for (int j = 0; j < n; ++j) similarity[j] = dots[j] * scale[j] + shift[j];
}

constexpr SumLoops kSumLoops{canonical_sums<Term::product>, canonical_sums<Term::squared_difference>,
                             canonical_sums<Term::square>, affine};

}  // namespace mgn::SET
