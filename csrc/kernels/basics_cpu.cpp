#include "basics_cpu.h"

#include <vector>

namespace mgn {
namespace {

// In the order of each_instruction_set_cpu.h.
#if defined(__x86_64__)
constexpr const char* kCompiled[] = {"avx512", "avx2", "baseline"};
bool runs(int compiled) {
  __builtin_cpu_init();
  if (compiled == 2) return true;
  if (!__builtin_cpu_supports("fma")) return false;
  if (compiled == 1) return __builtin_cpu_supports("avx2");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#else
constexpr const char* kCompiled[] = {"baseline"};
bool runs(int) { return true; }
#endif

const std::vector<int>& usable() {
  static const std::vector<int> sets = [] {
    std::vector<int> usable_sets;
    for (int set = 0; set < int(sizeof kCompiled / sizeof *kCompiled); ++set)
      if (runs(set)) usable_sets.push_back(set);
    return usable_sets;
  }();
  return sets;
}

}  // namespace

int instruction_sets() { return int(usable().size()); }
int compiled_instruction_set(int index) { return usable()[index]; }
const char* instruction_set_name(int index) { return kCompiled[usable()[index]]; }

}  // namespace mgn
