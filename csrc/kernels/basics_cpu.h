// What all CPU kernels use: threads, which the caller brings, the instruction sets of this CPU, and a little vector arithmetic.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Keeps the compiler from fusing the operation that made the value with the one that takes it: the value is rounded here.
#if defined(__x86_64__)
#define KEEP_ROUNDED(value) asm("" : "+v"(value))
#elif defined(__aarch64__)
#define KEEP_ROUNDED(value) asm("" : "+w"(value))
#else
#define KEEP_ROUNDED(value) asm("" : "+m"(value))
#endif

namespace mgn {

// Calls work(begin, end) on disjoint ranges that cover 0 … count, each of at least `grain` items if there are that many.
using Parallel = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work)>;

// Instruction sets that this build has code for and this CPU runs, fastest first; the last is the compiler's baseline.
int instruction_sets();
const char* instruction_set_name(int index);

// The place of the index-th of them in OF_EACH_INSTRUCTION_SET.
int compiled_instruction_set(int index);

template <typename Mask>
inline __attribute__((always_inline)) bool all_set(const Mask& mask) {
  uint64_t words[sizeof(Mask) / 8], all = ~uint64_t(0);
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all &= word;
  return all == ~uint64_t(0);
}

}  // namespace mgn
