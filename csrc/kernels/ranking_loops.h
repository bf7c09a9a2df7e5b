// The inner loops of counting, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

template <typename T> TARGET void negate(const T* distances, int n, T* similarity) {
  for (int j = 0; j < n; ++j) similarity[j] = -distances[j];
}

// Stores what is not below `low` (NaN is not), then anything up to a register's end, and returns how many that were.
template <typename T, typename Lanes> TARGET inline int compress(const Lanes& values, T low, T* kept) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_cmp_ps_mask(__m512(values), _mm512_set1_ps(low), _CMP_NLT_UQ);
    _mm512_storeu_ps(kept, _mm512_maskz_compress_ps(mask, __m512(values)));
    return __builtin_popcount(mask);
  }
#elif VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(__m256(values), _mm256_set1_ps(low), _CMP_NLT_UQ));
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFront.positions[mask])));
    _mm256_storeu_ps(kept, _mm256_permutevar8x32_ps(__m256(values), order));
    return __builtin_popcount(mask);
  }
#endif
  int count = 0;
  for (int i = 0; i < int(sizeof(Lanes) / sizeof(T)); ++i) {
    kept[count] = values[i];
    count += !(values[i] < low);
  }
  return count;
}

// Copies what is not below `low` (NaN is not) to the front of `kept`, which may be `values` and has 16 places more.
template <typename T, bool negated> TARGET int keep(const T* values, int n, T low, T* kept) {
  typedef T Lanes __attribute__((vector_size(VECTOR_BYTES)));  // aligned, as compress takes them
  typedef Lanes Loaded __attribute__((aligned(alignof(T))));
  constexpr int lanes = VECTOR_BYTES / int(sizeof(T));
  int count = 0, j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    Lanes first = *reinterpret_cast<const Loaded*>(values + j),
          second = *reinterpret_cast<const Loaded*>(values + j + lanes);
    if (negated) first = -first, second = -second;
    if (all_set((first < low) & (second < low))) continue;
    count += compress(first, low, kept + count);
    count += compress(second, low, kept + count);
  }
  for (; j < n; ++j) {
    const T value = negated ? -values[j] : values[j];
    kept[count] = value;
    count += !(value < low);
  }
  return count;
}

// How many values are above each of four levels' upper ends, and how many lie between its ends, of whole registers.
template <typename T>
TARGET void count_levels(const T* values, int n, const T* low, const T* high, int* above, int* open) {
  typedef T Lanes __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T))));
  constexpr int lanes = VECTOR_BYTES / int(sizeof(T));
  using Mask = decltype(Lanes{} < Lanes{});
  Mask higher[4] = {}, lower[4] = {};
  for (int j = 0; j < n; j += lanes) {
    const Lanes value = *reinterpret_cast<const Lanes*>(values + j);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      higher[i] += value > high[i];
      lower[i] += value < low[i];
    }
  }
  for (int i = 0; i < 4; ++i) {
    int below = above[i] = 0;
    for (int lane = 0; lane < lanes; ++lane) above[i] -= int(higher[i][lane]), below -= int(lower[i][lane]);
    open[i] = (n + lanes - 1) / lanes * lanes - above[i] - below;
  }
}

// Positions of the values between the ends of any of four levels, NaN among them.
template <typename T> TARGET int find_open(const T* values, int n, const T* low, const T* high, int* positions) {
  typedef T Lanes __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T))));
  constexpr int lanes = VECTOR_BYTES / int(sizeof(T));
  int count = 0;
  for (int j = 0; j < n; j += lanes) {
    const Lanes value = *reinterpret_cast<const Lanes*>(values + j);
    auto outside = (value < low[0]) | (value > high[0]);
#pragma GCC unroll 3
    for (int i = 1; i < 4; ++i) outside &= (value < low[i]) | (value > high[i]);
    if (all_set(outside)) continue;
    for (int lane = 0; lane < lanes && j + lane < n; ++lane)
      if (!outside[lane]) positions[count++] = j + lane;
  }
  return count;
}

template <typename T>
constexpr CountLoops<T> kCountLoops{negate<T>, keep<T, false>, keep<T, true>, count_levels<T>, find_open<T>};

}  // namespace mgn::SET
