// What the inner loops need beyond vector arithmetic.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// KEEP_ROUNDED(value) keeps the compiler from fusing what made the value with what takes it: it is rounded here.
#if defined(__x86_64__)
#define KEEP_ROUNDED(value) asm("" : "+v"(value))
#elif defined(__aarch64__)
#define KEEP_ROUNDED(value) asm("" : "+w"(value))
#else
#define KEEP_ROUNDED(value) asm("" : "+m"(value))
#endif

namespace mgn {

template <typename Mask>
inline __attribute__((always_inline)) bool all_set(const Mask& mask) {
  uint64_t words[sizeof(Mask) / 8], all = ~uint64_t(0);
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all &= word;
  return all == ~uint64_t(0);
}

}  // namespace mgn
