// What all CPU kernels use: threads, which the caller brings, the instruction sets of this CPU, vector arithmetic.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Rounds the value here: the compiler cannot fuse the operation that made it with the one that uses it.
#if defined(__x86_64__)
#define KEEP_ROUNDED(value) asm("" : "+v"(value))
#elif defined(__aarch64__)
#define KEEP_ROUNDED(value) asm("" : "+w"(value))
#else
#define KEEP_ROUNDED(value) asm("" : "+m"(value))
#endif

namespace mgn {

// Calls work(begin, end) on disjoint ranges that cover 0 … count, each of at least `grain` items if possible.
using Parallel = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work)>;

// How many items of `size` make up `total`; at least one.
inline int64_t grain_of(int64_t total, int64_t size) {
  return std::max<int64_t>(1, total / std::max<int64_t>(size, 1));
}

// Fetches numbers into the second-level cache, while the caller computes with others.
inline void fetch(const float* numbers, int64_t count) {
  for (int64_t k = 0; k < count; k += 16) __builtin_prefetch(numbers + k, 0, 2);
}

// Instruction sets that this build has code for and this CPU runs, fastest first; the last is the compiler's baseline.
int instruction_sets();
const char* instruction_set_name(int index);

// The place of the index-th of them in OF_EACH_INSTRUCTION_SET.
int compiled_instruction_set(int index);

// Denormals are numbers while it lives, on this thread: flushed to zero they would change sums.
class Denormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();

 public:
  Denormals() { _mm_setcsr(saved & ~0x8040u); }
  ~Denormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;

 public:
  Denormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" : : "r"(saved & ~(uint64_t(1) << 24)));
  }
  ~Denormals() { asm volatile("msr fpcr, %0" : : "r"(saved)); }
#endif
};

template <typename Mask> inline __attribute__((always_inline)) bool all_set(const Mask& mask) {
  uint64_t words[sizeof(Mask) / 8], all = ~uint64_t(0);
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all &= word;
  return all == ~uint64_t(0);
}

}  // namespace mgn
