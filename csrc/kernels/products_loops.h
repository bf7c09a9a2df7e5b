// The inner loops of products, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

typedef float Line __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kLine = VECTOR_BYTES / 4;
constexpr int kHigh = 3 * REGISTERS / 8, kWide = 2 * kLine;  // of a register tile, which takes 3/4 of the registers
constexpr int kAhead = 8, kRowsAhead = 128;  // terms fetched before their use, from the second-level cache, the third

// sums (kHigh, kWide) += Σ rows[k, r] · columns[k, c] over `count` terms k, each rounded once.
TARGET void add_products(const float* rows, const float* columns, int64_t count, float* sums) {
  Line sum[kHigh][2] = {};
  for (int64_t k = 0; k < count; ++k) {
    const Line* column = reinterpret_cast<const Line*>(columns + k * kWide);
    const Line first = column[0], second = column[1];
    __builtin_prefetch(rows + (k + kRowsAhead) * kHigh);
    __builtin_prefetch(column + 2 * kAhead);
    __builtin_prefetch(column + 2 * kAhead + 1);
#pragma GCC unroll 12
    for (int r = 0; r < kHigh; ++r) {
      sum[r][0] += first * rows[k * kHigh + r];
      sum[r][1] += second * rows[k * kHigh + r];
    }
  }
  Line* out = reinterpret_cast<Line*>(sums);
#pragma GCC unroll 12
  for (int r = 0; r < kHigh; ++r) out[2 * r] += sum[r][0], out[2 * r + 1] += sum[r][1];
}

// Lane j of the result is lane j ^ step.
template <int step> TARGET inline Line exchanged(Line lanes) {
#if VECTOR_BYTES == 64
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return Line(_mm512_maskz_permutexvar_ps(0xffff, order ^ _mm512_set1_epi32(step), __m512(lanes)));
#elif VECTOR_BYTES == 32
  const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return Line(_mm256_permutevar8x32_ps(__m256(lanes), order ^ _mm256_set1_epi32(step)));
#else
  Line result;
  for (int j = 0; j < kLine; ++j) result[j] = lanes[j ^ step];
  return result;
#endif
}

// Exchanges, in a square of lines, what differs in place and line by `step`: with every step, it is transposed.
template <int step> TARGET inline void exchange(Line* lines) {
  decltype(Line{} < Line{}) upper;
  for (int j = 0; j < kLine; ++j) upper[j] = j & step ? -1 : 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLine; ++i) {
    if (i & step) continue;
    const Line low = lines[i], high = lines[i + step];
    lines[i] = upper ? exchanged<step>(high) : low;
    lines[i + step] = upper ? high : exchanged<step>(low);
  }
}

// Transposes kLine lines in place.
TARGET inline void transpose(Line* lines) {
  exchange<1>(lines), exchange<2>(lines);
#if VECTOR_BYTES >= 32
  exchange<4>(lines);
#endif
#if VECTOR_BYTES == 64
  exchange<8>(lines);
#endif
}

// (count ≤ kWide, d) rows → columns (d, kWide); 0 beyond the last.
TARGET void pack_columns(const float* rows, int64_t count, int64_t stride, int64_t d, float* columns, const double*,
                         Lost*) {
  for (int64_t c = 0; c < kWide; c += kLine)
    for (int64_t k = 0; k < d; k += kLine) {
      const int64_t width = std::min<int64_t>(kLine, d - k);
      Line lines[kLine];
#pragma GCC unroll 16
      for (int i = 0; i < kLine; ++i) {
        lines[i] = Line{};
        if (c + i >= count) continue;
        if (width == kLine)
          __builtin_memcpy(&lines[i], rows + (c + i) * stride + k, sizeof(Line));
        else
          __builtin_memcpy(&lines[i], rows + (c + i) * stride + k, width * sizeof(float));
      }
      transpose(lines);
      for (int64_t i = 0; i < width; ++i) *reinterpret_cast<Line*>(columns + (k + i) * kWide + c) = lines[i];
    }
}

// (count ≤ kHigh, d) rows → panel (d, kHigh).
inline void pack_rows(const float* rows, int64_t count, int64_t stride, int64_t d, float* panel) {
  pack_panel(rows, count, stride, d, kHigh, panel);
}

constexpr ProductLoops kProductLoops = {
    .runs = [] { return true; }, .high = kHigh, .wide = kWide, .unit = 1, .unit_floats = 1, .items = 64,
    .dimensions = 4096, .queries = 512, .pack_rows = pack_rows, .pack_columns = pack_columns,
    .add_products = add_products};

}  // namespace mgn::SET
