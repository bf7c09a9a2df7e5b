// The inner loops of squared distances, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

template <typename T> struct Register {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename T> constexpr int kLanes = VECTOR_BYTES / int(sizeof(T));
template <typename T> constexpr int kWidth = 2 * kLanes<T>;  // columns of a panel
constexpr int kGroup = REGISTERS / 4;                        // rows of a register tile, two sums each; divides kWidth

// dist2[r][c] += Σ (column c − row r)² over dimensions from … to. Differences, not x² + y² − 2xy: nothing cancels,
// equal rows get equal sums, and the second instruction per element costs less than repairing what cancellation breaks.
template <typename T>
TARGET void add_squares(const T* const* rows, const T* panel, int64_t from, int64_t to, T* dist2) {
  using Lanes = typename Register<T>::type;
  Lanes sum[kGroup][2] = {};
  for (int64_t k = from; k < to; ++k) {
    const Lanes* column = reinterpret_cast<const Lanes*>(panel + k * kWidth<T>);
    const Lanes first = column[0], second = column[1];
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) {
      const Lanes x = first - rows[r][k], y = second - rows[r][k];
      sum[r][0] += x * x;
      sum[r][1] += y * y;
    }
  }
  Lanes* out = reinterpret_cast<Lanes*>(dist2);
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) {
    out[2 * r] += sum[r][0];
    out[2 * r + 1] += sum[r][1];
  }
}

// Σ (x − y)² in double, of one pair.
template <typename T> TARGET double squares(const T* x, const T* y, int64_t d) {
  constexpr int kWide = kLanes<double>;
  typedef T Narrow __attribute__((vector_size(kWide * sizeof(T)), aligned(alignof(T))));
  using Wide = typename Register<double>::type;
  Wide sum[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWide <= d; k += 2 * kWide)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Wide difference = __builtin_convertvector(*reinterpret_cast<const Narrow*>(x + k + half * kWide), Wide) -
                              __builtin_convertvector(*reinterpret_cast<const Narrow*>(y + k + half * kWide), Wide);
      sum[half] += difference * difference;
    }
  double total = 0;
  for (; k < d; ++k) total += (double(x[k]) - double(y[k])) * (double(x[k]) - double(y[k]));
  sum[0] += sum[1];
  for (int j = 0; j < kWide; ++j) total += sum[0][j];
  return total;
}

template <typename T> inline constexpr Squares<T> kSquares{kGroup, kWidth<T>, add_squares<T>, squares<T>};

}  // namespace mgn::SET
