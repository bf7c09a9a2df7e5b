// The inner loops of batch-hard mining, included once per instruction set by each_instruction_set_cpu.h: no guard.
namespace mgn::SET {

// Whether any candidate of the panel could change the best of anchor i, or, where `both`, anchor i that of a candidate.
template <typename T>
TARGET bool any_better(const T* dist2, const int32_t* panel_labels, int32_t label, T best_an, const T* panel_an,
                       bool both) {
  int better = 0;
  if (both)
    for (int c = 0; c < kWidth<T>; ++c)
      better |= (panel_labels[c] == label) | (dist2[c] <= best_an) | (dist2[c] <= panel_an[c]);
  else
    for (int c = 0; c < kWidth<T>; ++c) better |= (panel_labels[c] == label) | (dist2[c] <= best_an);
  return better != 0;
}

// What a mined pair pulls with: the unit vector from candidate to anchor, times grad.
template <typename T>
TARGET void pull(const T* anchor, const T* candidate, T dist, T grad, int64_t from, int64_t to, T* to_anchor,
                 T* to_candidate) {
  const T unit = T(1) / dist;
  const bool divide = !std::isnormal(unit);  // of the smallest and the largest distances
  for (int64_t k = from; k < to; ++k) {
    const T difference = anchor[k] - candidate[k];
    const T change = (divide ? difference / dist : difference * unit) * grad;
    to_anchor[k] += change;
    to_candidate[k] -= change;
  }
}

template <typename T> constexpr Loops<T> kLoops{any_better<T>, pull<T>};

}  // namespace mgn::SET
