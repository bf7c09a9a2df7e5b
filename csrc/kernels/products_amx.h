// The loops of products by AMX, for products_cpu.cpp: tiles of 16 × 32 bfloat16, on Intel CPUs since 2023.
//
// A number is split into high + low, both of bfloat16. Of the four products of halves three are added up; residuals
// bound what is left out.
#pragma once
#include <cmath>

#include "basics_cpu.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))  // of GCC, of clang
#define MGN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mgn::amx {

#if defined(MGN_AMX)
#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma,avx512bf16,amx-tile,amx-bf16")))

using avx512::Line, avx512::transpose;

constexpr int kSide = 32;  // of the sums: 2 × 2 tiles; also how many terms of a row are split together
constexpr int64_t kTile = 1024, kStep = 4 * kTile;  // bytes; the high and low halves of kSide × kSide numbers

// Whether this CPU has such units and Linux, which has to be asked, lets this process use them.
inline bool runs() {
  static const bool allowed = [] {
    constexpr unsigned kUnits = 1u << 22 | 1u << 24;  // for bfloat16, and tiles
    constexpr int kAskFor = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kUnits) == kUnits &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1 &&  // AVX512-BF16
           syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  }();
  return allowed;
}

// Sixteen of 32 numbers of bfloat16, as float32.
TARGET inline Line widened(const Line& numbers, bool last) {
  uint16_t half __attribute__((vector_size(32)));
  std::memcpy(&half, reinterpret_cast<const char*>(&numbers) + last * sizeof half, sizeof half);
  typedef uint32_t Words __attribute__((vector_size(64)));
  return Line(__builtin_convertvector(half, Words) << 16);
}

// The first `count` of 32 numbers, then 0, as high and low; left[2]: each number without its high half.
TARGET inline void split(const float* numbers, int64_t count, Line& high, Line& low, Line* left) {
  for (int i = 0; i < 2; ++i) {
    const int64_t width = std::clamp<int64_t>(count - 16 * i, 0, 16);
    left[i] = Line(_mm512_maskz_loadu_ps(__mmask16((1u << width) - 1), numbers + (width ? 16 * i : 0)));
  }
  high = Line(_mm512_cvtne2ps_pbh(__m512(left[1]), __m512(left[0])));
  for (int i = 0; i < 2; ++i) left[i] -= widened(high, i);
  low = Line(_mm512_cvtne2ps_pbh(__m512(left[1]), __m512(left[0])));
}

// Panels and columns: for each kSide terms, tiles of high halves of 16 rows and 16 more, then those of low halves.
TARGET void pack_rows(const float* rows, int64_t count, int64_t stride, int64_t d, float* panel) {
  char* step = reinterpret_cast<char*>(panel);
  for (int64_t k = 0; k < d; k += kSide, step += kStep)
    for (int r = 0; r < kSide; ++r) {
      Line high = {}, low = {}, left[2];
      if (r < count) split(rows + r * stride + k, d - k, high, low, left);
      std::memcpy(step + r * sizeof(Line), &high, sizeof(Line));
      std::memcpy(step + 2 * kTile + r * sizeof(Line), &low, sizeof(Line));
    }
}

// As rows, but a line of a tile holds a pair of terms of 16 columns.
TARGET void pack_columns(const float* rows, int64_t count, int64_t stride, int64_t d, float* columns,
                         const double* norms, Lost* lost) {
  char* step = reinterpret_cast<char*>(columns);
  Line scale[kSide] = {}, lows[kSide] = {}, rests[kSide] = {};
  for (int64_t i = 0; norms && i < count; ++i) scale[i] += float(1 / norms[i]);  // so that squares do not underflow
  for (int64_t k = 0; k < d; k += kSide, step += kStep)
    for (int c = 0; c < kSide; c += 16) {
      Line halves[2][16] = {}, left[2];
      for (int i = c; i < std::min<int64_t>(c + 16, count); ++i) {
        Line& low = halves[1][i - c];
        split(rows + i * stride + k, d - k, halves[0][i - c], low, left);
        for (int part = 0; norms && part < 2; ++part) {
          const Line kept = widened(low, part) * scale[i], rest = left[part] * scale[i] - kept;
          lows[i] += kept * kept, rests[i] += rest * rest;
        }
      }
      for (int half = 0; half < 2; ++half) {
        transpose(halves[half]);
        std::memcpy(step + 2 * half * kTile + c * sizeof(Line), halves[half], kTile);
      }
    }
  for (int64_t i = 0; norms && i < count; ++i)
    for (int j = 0; j < 16; ++j) lost[i].low += lows[i][j], lost[i].rest += rests[i][j];
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a line
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Configuration kConfiguration;

TARGET inline void add_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums (kSide, kSide) += the sum, for each kSide terms, of low · high, then high · high, then high · low.
TARGET void add_products(const float* rows, const float* columns, int64_t count, float* sums) {
  const char *a = reinterpret_cast<const char*>(rows), *b = reinterpret_cast<const char*>(columns);
  _tile_loadconfig(&kConfiguration);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; count > 0; count -= kSide, a += kStep, b += kStep) {
    _tile_loadd(4, a + 2 * kTile, 64);
    _tile_loadd(5, a + 3 * kTile, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    add_tiles();
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTile, 64);
    add_tiles();
    _tile_loadd(6, b + 2 * kTile, 64);
    _tile_loadd(7, b + 3 * kTile, 64);
    add_tiles();
  }
  Line sum[kSide][2], *out = reinterpret_cast<Line*>(sums);
  _tile_stored(0, sum, sizeof *sum);
  _tile_stored(1, &sum[0][1], sizeof *sum);
  _tile_stored(2, sum[16], sizeof *sum);
  _tile_stored(3, &sum[16][1], sizeof *sum);
  _tile_release();
  for (int r = 0; r < kSide; ++r) out[2 * r] += sum[r][0], out[2 * r + 1] += sum[r][1];
}

constexpr ProductLoops kProductLoops = {
    .runs = runs, .high = kSide, .wide = kSide, .unit = kSide, .unit_floats = kSide, .items = 128, .dimensions = 2048,
    .queries = 256, .pack_rows = pack_rows, .pack_columns = pack_columns, .add_products = add_products};
#undef TARGET
#else
constexpr ProductLoops kProductLoops{};
#endif

}  // namespace mgn::amx
