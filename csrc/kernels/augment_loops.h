// The inner loop of augmentation, compiled once for each instruction set by each_instruction_set.h: no include guard.
namespace mgn {
namespace SET {

// A division, not a product with the reciprocal, which rounds otherwise: it hides behind the writing of the result.
TARGET void normalise_row(const uint8_t* __restrict values, const float* __restrict mean, const float* __restrict deviation,
                          int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (float(values[i]) - mean[i]) / deviation[i];
}

}  // namespace SET
}  // namespace mgn
