// __half for the emulator: the conversions that the kernels use, bit for bit those of IEEE binary16.
#pragma once
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(1024 + fraction), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {uint16_t(sign | 0x7fff)};
  int exponent;
  std::frexp(x, &exponent);
  // The unit of the last place: 2⁻²⁴ below the smallest normal number, 2^(e−11) above. nearbyint rounds half to even.
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const float magnitude =
      std::fabs(x) >= 65520.f ? INFINITY : std::ldexp(std::nearbyint(std::ldexp(std::fabs(x), -unit)), unit);
  if (std::isinf(magnitude)) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) return {uint16_t(sign | int(std::ldexp(magnitude, 24)))};
  std::frexp(magnitude, &exponent);
  return {uint16_t(sign | ((exponent + 14) << 10) | (int(std::ldexp(magnitude, 11 - exponent)) & 1023))};
}
