// What the CPU kernels share: threads that the caller brings, and the instruction sets of this CPU.
#pragma once
#include <cstdint>
#include <functional>

namespace mgn {

// Calls work(begin, end) on disjoint ranges that cover 0 … count, each of at least `grain` items where there are as many.
using Parallel = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work)>;

// Instruction sets that this build has code for and this CPU runs, fastest first; the last is the compiler's baseline.
int instruction_sets();
const char* instruction_set_name(int index);

// Where the index-th of them stands in OF_EACH_INSTRUCTION_SET.
int compiled_instruction_set(int index);

}  // namespace mgn
