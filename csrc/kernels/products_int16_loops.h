// The inner loops of products of int16, by VNNI: an instruction multiplies two pairs and adds both products to an
// int32. Included once per instruction set by each_instruction_set_cpu.h, after products_loops.h, whose lines and
// register tile they use: no guard.
//
// For every 64 terms of a row a panel holds a step and how many steps each term is, a whole number. The norm of these
// numbers is at most 46,304. So by Cauchy and Schwarz every sum of their products with those of another row is below
// 2³¹: exact.
namespace mgn::SET {

#if VECTOR_BYTES == 64
#define VNNI __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma,avx512vnni")))
#define ADD_PAIRS(sum, x, y) Integers(_mm512_dpwssd_epi32(__m512i(sum), __m512i(x), __m512i(y)))
#elif VECTOR_BYTES == 32 && __has_include(<avxvnniintrin.h>)
#define VNNI __attribute__((target("avx2,fma,avxvnni")))
#define ADD_PAIRS(sum, x, y) Integers(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(x), __m256i(y)))
#endif

#if defined(VNNI)
constexpr int kTerms = 64, kPairs = kTerms / 2, kPieces = kPairs / kLine;  // of one step; lines that hold the pairs
constexpr int kBlockFloats = kPairs + 1;                                   // that hold a step and its pairs
constexpr float kMostNorm = 46300, kMost = 32766;                          // of the terms, in steps
static_assert((kMostNorm + 5) * (kMostNorm + 5) < 0x1p31f && kTerms == 64, "rounding adds up to 4, float32 a little");
static_assert(kHigh <= kLine, "steps_of takes up to kLine rows");
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES), may_alias));
#if VECTOR_BYTES == 64
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
#else
inline bool has_vnni() {  // for which __builtin_cpu_supports has no name in clang before version 19
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

TARGET inline Line line_at(const float* place) {
  Line line;
  std::memcpy(&line, place, sizeof line);
  return line;
}

// kTerms terms: those of a row, of which there are `width`, then 0. `room` has room for them.
inline const float* padded(const float* terms, int64_t width, float* room) {
  if (width >= kTerms) return terms;
  std::fill(std::copy_n(terms, width, room), room + kTerms, 0.0f);
  return room;
}

TARGET inline Line larger(const Line& x, const Line& y) { return x > y ? x : y; }

// The steps of up to kLine rows, one a lane; NaN if a term is, by the sum of squares: std::max keeps its first
// argument.
TARGET inline Line steps_of(const float* rows, int64_t count, int64_t stride, int64_t width) {
  Line squares[kLine] = {}, largest[kLine] = {}, steps;
  for (int64_t r = 0; r < count; ++r) {
    alignas(Line) float room[kTerms];
    const float* const terms = padded(rows + r * stride, width, room);
#pragma GCC unroll 16
    for (int k = 0; k < kTerms; k += kLine) {
      const Line size = Line(Words(line_at(terms + k)) & 0x7fffffff);
      squares[r] += size * size;
      largest[r] = larger(size, largest[r]);
    }
  }
  transpose(squares), transpose(largest);
  for (int i = 1; i < kLine; ++i) squares[0] += squares[i], largest[0] = larger(largest[i], largest[0]);
  for (int r = 0; r < kLine; ++r) steps[r] = std::max(std::sqrt(squares[0][r]) / kMostNorm, largest[0][r] / kMost);
  return steps;
}

// Writes kPieces lines of pairs, `apart` lines from each other. Of 2 · kLine terms, number j (in the low 16 bits) is
// paired with number kLine + j. Adds to `lost` the squares of what rounding takes of scale · terms, so that with a
// scale of 1 / ‖row‖ they do not underflow.
TARGET inline void round_to_steps(const float* row, int64_t width, float step, Line* pairs, int apart, float scale,
                                  Line& lost) {
  alignas(Line) float room[kTerms];
  const float* const terms = padded(row, width, room);
  // Where the squares of all terms come near underflow, nothing is kept: all is lost, and measured.
  const float inverse = step >= 0x1p-70f ? 1 / step : 0;
  constexpr float kWhole = 0x1.8p23f;  // added to it, a number is rounded to a whole one, in its last bits
#pragma GCC unroll 16
  for (int i = 0; i < kPieces; ++i) {
    Line halves[2];
    for (int half = 0; half < 2; ++half) {
      const Line term = line_at(terms + (2 * i + half) * kLine);
      halves[half] = term * inverse + kWhole;
      const Line rest = (term - (halves[half] - kWhole) * step) * scale;
      lost += rest * rest;
    }
    pairs[i * apart] = Line((Words(halves[0]) & 0xffff) | Words(halves[1]) << 16);
  }
}

// (count ≤ kHigh, d) rows → panel: for each kTerms terms the steps, then pairs (kPairs, kHigh).
TARGET void pack_rows_of_pairs(const float* rows, int64_t count, int64_t stride, int64_t d, float* panel) {
  for (int64_t k = 0; k < d; k += kTerms, panel += kBlockFloats * kHigh) {
    const Line steps = steps_of(rows + k, count, stride, d - k);
    for (int r = 0; r < kHigh; ++r) {
      Line pairs[kPieces] = {}, lost = {};
      if (r < count) round_to_steps(rows + r * stride + k, d - k, steps[r], pairs, 1, 0, lost);
      panel[r] = steps[r];
      for (int j = 0; j < kPairs; ++j) panel[(1 + j) * kHigh + r] = pairs[j / kLine][j % kLine];
    }
  }
}

// (count ≤ kWide, d) rows → columns: for each kTerms terms the steps, then pairs (kPairs, kWide).
TARGET void pack_columns_of_pairs(const float* rows, int64_t count, int64_t stride, int64_t d, float* columns,
                                  const double* norms, Lost* lost) {
  Line rests[kWide] = {};
  for (int64_t k = 0; k < d; k += kTerms, columns += kBlockFloats * kWide)
    for (int c = 0; c < kWide; c += kLine) {
      const float* const first = rows + c * stride + k;
      const int64_t here = std::clamp<int64_t>(count - c, 0, kLine);
      const Line steps = steps_of(first, here, stride, d - k);
      Line pairs[kPieces][kLine] = {};
      for (int64_t r = 0; r < here; ++r)
        round_to_steps(first + r * stride, d - k, steps[r], &pairs[0][r], kLine, norms ? float(1 / norms[c + r]) : 0,
                       rests[c + r]);
      *reinterpret_cast<Line*>(columns + c) = steps;
      for (int piece = 0; piece < kPieces; ++piece) {
        transpose(pairs[piece]);
        for (int i = 0; i < kLine; ++i)
          *reinterpret_cast<Line*>(columns + (1 + piece * kLine + i) * kWide + c) = pairs[piece][i];
      }
    }
  for (int64_t i = 0; norms && i < count; ++i)
    for (int j = 0; j < kLine; ++j) lost[i].rest += rests[i][j];
}

// sums (kHigh, kWide) += for each kTerms terms the exact sum of their products, times both steps.
VNNI void add_products_of_pairs(const float* rows, const float* columns, int64_t count, float* sums) {
  for (; count > 0; count -= kTerms, rows += kBlockFloats * kHigh, columns += kBlockFloats * kWide) {
    Integers sum[kHigh][2] = {};
    const auto* const lines = reinterpret_cast<const Integers*>(columns);
    for (int k = 1; k <= kPairs; ++k) {
      const Integers first = lines[2 * k], second = lines[2 * k + 1];
      __builtin_prefetch(rows + (k + kRowsAhead) * kHigh);
      __builtin_prefetch(lines + 2 * (k + kAhead));
      __builtin_prefetch(lines + 2 * (k + kAhead) + 1);
#pragma GCC unroll 12
      for (int r = 0; r < kHigh; ++r) {
        int32_t pair;
        std::memcpy(&pair, rows + k * kHigh + r, sizeof pair);
        sum[r][0] = ADD_PAIRS(sum[r][0], first, Integers{} + pair);
        sum[r][1] = ADD_PAIRS(sum[r][1], second, Integers{} + pair);
      }
    }
    const auto* const steps = reinterpret_cast<const Line*>(columns);
    const Line first = steps[0], second = steps[1];
    Line* const out = reinterpret_cast<Line*>(sums);
#pragma GCC unroll 12
    for (int r = 0; r < kHigh; ++r) {
      out[2 * r] += __builtin_convertvector(sum[r][0], Line) * first * rows[r];
      out[2 * r + 1] += __builtin_convertvector(sum[r][1], Line) * second * rows[r];
    }
  }
}

constexpr ProductLoops kInt16Loops = {
    .runs = has_vnni, .high = kHigh, .wide = kWide, .unit = kTerms, .unit_floats = kBlockFloats, .items = 128,
    .dimensions = 4096, .queries = 512, .pack_rows = pack_rows_of_pairs, .pack_columns = pack_columns_of_pairs,
    .add_products = add_products_of_pairs};
#undef VNNI
#undef ADD_PAIRS
#else
constexpr ProductLoops kInt16Loops{};
#endif

}  // namespace mgn::SET
