// Counts the bank conflicts of shared memory. It is linked to sources that -fsanitize=thread has instrumented, in the
// place of that option's library: every load and store calls a function below. At exit it writes to the file
// EMULATOR_BANKS, for each place of the code: its address, whether it stores, how many accesses of whole warps there
// were, how many passes over the banks they took, and how many they would take without a conflict.
//
// A multiprocessor has 32 banks of 4 bytes. In a pass each serves one word, to every lane that asks for it. Accesses of
// 16 bytes go by eight lanes, of 8 bytes by sixteen. The n-th accesses of the lanes at a place are one of their warp.
// Atomics are not counted.
#include <cuda_runtime.h>

#include <array>
#include <set>
#include <tuple>

namespace {

using Access = std::vector<std::pair<unsigned, uintptr_t>>;  // lane and address
using Place = std::tuple<uintptr_t, bool, size_t>;           // of the code, whether it stores, bytes
std::map<Place, std::map<std::tuple<unsigned, unsigned, unsigned>, Access>> accesses;  // of block and warp, the n-th
std::map<Place, std::map<unsigned, unsigned>> times;                                   // by thread of the block
std::map<Place, std::array<uint64_t, 3>> counts;
unsigned block = ~0u;
bool busy = false;

unsigned passes(const Access& access, size_t bytes) {
  unsigned total = 0;
  const unsigned lanes = bytes > 4 ? unsigned(128 / bytes) : 32;
  for (unsigned first = 0; first < 32; first += lanes) {
    std::map<uintptr_t, std::set<uintptr_t>> words;
    size_t most = 0;
    for (const auto& [lane, address] : access)
      if (first <= lane && lane < first + lanes)
        for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
          auto& of_bank = words[word % 32];
          of_bank.insert(word);
          most = std::max(most, of_bank.size());
        }
    total += unsigned(most);
  }
  return total;
}

unsigned least(const Access& access, size_t bytes) {
  std::set<unsigned> parts;
  for (const auto& [lane, address] : access) parts.insert(lane / (bytes > 4 ? unsigned(128 / bytes) : 32));
  return unsigned(parts.size());
}

void count_all() {
  for (const auto& [place, of_place] : accesses)
    for (const auto& [key, access] : of_place) {
      auto& count = counts[place];
      count[0] += 1, count[1] += passes(access, std::get<2>(place)), count[2] += least(access, std::get<2>(place));
    }
  accesses.clear();
  times.clear();
}

struct AtExit {
  ~AtExit() {
    busy = true;
    count_all();
    std::FILE* file = std::getenv("EMULATOR_BANKS") ? std::fopen(std::getenv("EMULATOR_BANKS"), "w") : nullptr;
    if (!file) return;
    for (const auto& [place, count] : counts)
      std::fprintf(file, "%zx %d %llu %llu %llu\n", size_t(std::get<0>(place)), std::get<1>(place),
                   (unsigned long long)count[0], (unsigned long long)count[1], (unsigned long long)count[2]);
    std::fclose(file);
  }
} at_exit;

void saw(const void* address, size_t bytes, bool stores, void* code) {
  if (busy || !emulator::machine.current) return;
  busy = true;
  const auto& shared = emulator::shared_memory();
  const char* byte = static_cast<const char*>(address);
  if (byte >= shared.data && byte < shared.data + shared.size) {
    if (block != blockIdx.x) count_all(), block = blockIdx.x;
    const Place place = {uintptr_t(code), stores, bytes};
    const unsigned thread = emulator::number(*emulator::machine.current);
    accesses[place][{block, thread / 32, times[place][thread]++}].push_back({thread % 32, uintptr_t(address)});
  }
  busy = false;
}

}  // namespace

#define ACCESS(kind, bytes, stores)                               \
  extern "C" void __tsan_##kind##bytes(void* address) { \
    saw(address, bytes, stores, __builtin_return_address(0));     \
  }
#define ACCESSES(bytes)        \
  ACCESS(read, bytes, false)   \
  ACCESS(write, bytes, true)   \
  ACCESS(unaligned_read, bytes, false) ACCESS(unaligned_write, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" {
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* address, size_t bytes) {
  saw(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  saw(address, bytes, true, __builtin_return_address(0));
}
int __tsan_atomic32_fetch_add(volatile int* target, int value, int) {
  const int before = *target;
  *target = before + value;
  return before;
}
long long __tsan_atomic64_fetch_add(volatile long long* target, long long value, int) {
  const long long before = *target;
  *target = before + value;
  return before;
}
}
