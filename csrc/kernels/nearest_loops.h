// The inner loops of selecting, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

// Positions of the values that are not at or above `limit` (NaN is not; nor is any if `limit` is NaN).
template <typename T> TARGET int find_below(const T* values, int n, T limit, int* positions) {
  typedef T Lanes __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T))));
  constexpr int lanes = VECTOR_BYTES / int(sizeof(T)), step = 4 * lanes;
  int count = 0, j = 0;
  for (; j + step <= n; j += step) {
    const Lanes* four = reinterpret_cast<const Lanes*>(values + j);
    if (all_set((four[0] >= limit) & (four[1] >= limit) & (four[2] >= limit) & (four[3] >= limit))) continue;
    for (int part = 0; part < 4; ++part) {
      if (all_set(four[part] >= limit)) continue;
      for (int i = j + part * lanes; i < j + (part + 1) * lanes; ++i) {
        positions[count] = i;
        count += !(values[i] >= limit);
      }
    }
  }
  for (; j < n; ++j) {
    positions[count] = j;
    count += !(values[j] >= limit);
  }
  return count;
}

template <typename T> constexpr SelectLoops<T> kSelectLoops{find_below<T>};

}  // namespace mgn::SET
