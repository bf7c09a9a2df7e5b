// Runs CUDA kernels on the host: put this folder on the include path and compile the .cu files with
// g++ -x c++ -U_FORTIFY_SOURCE.
//
// A CUDA thread is a fiber. The threads of a block take turns on one host thread and switch where they wait for each
// other. EMULATOR_ORDER is forward, reverse or a seed: the order of blocks, and of threads between two waits. A missing
// barrier shows in at least one order, and under ThreadSanitizer in every order.
//
// Blocks run one after another or, without a sanitizer, EMULATOR_BLOCKS of them (up to 4) at a time: they take turns at
// random, at waits, fences and atomics. Each then sees global memory as it was when it started or last had a fence, and
// what it writes is hidden from the others until its next fence or, if none comes, until all have ended. A fence
// publishes what any thread of its block has written. Atomics are seen at once, and publish nothing
// else. Global memory is what was passed to emulator::global_memory.
//
// Without a sanitizer shared memory starts each block as 0xAB bytes. The program aborts, naming reason and place, at a
// barrier that not all threads reach, at a warp intrinsic whose mask does not match its callers, and at a deadlock.
//
// Not covered: dynamic shared memory, inline PTX, tensor cores, speed. It has the intrinsics that the project's kernels
// use; a new one goes to the end of this file.
#pragma once
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
// The scheduler itself is not to be watched: what it reads and writes of a fiber's is no race and no overflow.
#define EMULATOR_UNWATCHED __attribute__((no_sanitize("thread", "address", "undefined")))

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Thread-local variables lie together, those of templates too, and can be poisoned and exchanged. AddressSanitizer does
// not watch them.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define EMULATOR_SANITIZED 1
#define __shared__ static
#else
#define EMULATOR_SANITIZED 0
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx;

namespace emulator {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarpSize = 32, kMostThreads = 1024, kMostBlocks = 4;

enum class State { ready, at_warp, at_barrier, done };

struct Thread {
  dim3 index;
  State state;
  bool started;
  unsigned mask;      // of the warp intrinsic that it waits at
  const char* place;  // where it waits, file and line
  ucontext_t start;
  jmp_buf context;
  char* stack;
#if defined(__SANITIZE_THREAD__)
  void* fiber;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
};

struct Warp {
  uint64_t given[kWarpSize], taken[kWarpSize];  // what each lane brought to the intrinsic, and a copy once all have
  char order;  // ThreadSanitizer: everything before the meeting happens before all after it
};

struct Block {
  Thread threads[kMostThreads];
  Warp warps[kMostThreads / kWarpSize];
  unsigned index;
  bool running;
  // While another runs: its shared memory, and global memory as it sees it. Always: global memory at its last fence.
  std::vector<char> shared, view, fenced;
};

struct Machine {
  Block blocks[kMostBlocks];
  Block* block;    // that runs
  unsigned at_a_time = 1;
  bool yielded;
  unsigned count;  // threads of a block
  Thread* current;
  std::map<char*, size_t> global;                 // memory, and
  std::vector<char> published;                    // what it holds, where blocks run at the same time
  std::vector<std::pair<size_t, char>> unfenced;  // of blocks that have ended
  std::function<void()>* kernel;
  jmp_buf scheduler;
  char order;  // as in Warp, of a whole block
#if defined(__SANITIZE_THREAD__)
  void* main_fiber;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack;
  size_t main_stack_size;
  void* main_fake_stack;
#endif
};
inline Machine machine;

EMULATOR_UNWATCHED inline unsigned number(const Thread& thread) { return unsigned(&thread - machine.block->threads); }
EMULATOR_UNWATCHED inline unsigned lane() { return number(*machine.current) % kWarpSize; }
EMULATOR_UNWATCHED inline Warp& warp() { return machine.block->warps[number(*machine.current) / kWarpSize]; }
EMULATOR_UNWATCHED inline const dim3& thread_index() { return machine.current->index; }

[[noreturn]] EMULATOR_UNWATCHED inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s, in block %u\n", what, blockIdx.x);
  const Thread* last = nullptr;
  for (unsigned i = 0; i < machine.count; ++i) {  // one line for each run of threads that are at the same place
    const Thread& t = machine.block->threads[i];
    if (last && last->state == t.state && last->place == t.place && last->mask == t.mask) continue;
    const char* const states[] = {"ready", "waits in a warp", "waits at a barrier", "has returned"};
    std::fprintf(stderr, "  from thread %u: %s, mask %08x, %s\n", i, states[int(t.state)], t.mask,
                 t.place ? t.place : "at its start");
    last = &t;
  }
  std::abort();
}

inline void happens_before(char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(order);
#endif
  (void)order;
}
inline void happens_after(char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
  (void)order;
}

EMULATOR_UNWATCHED inline void to_scheduler() {
  Thread* self = machine.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.main_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->state == State::done ? nullptr : &self->fake_stack, machine.main_stack,
                                 machine.main_stack_size);
#endif
  if (_setjmp(self->context) == 0) _longjmp(machine.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

EMULATOR_UNWATCHED inline void run_kernel() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_size);
#endif
  happens_after(&machine.order);
  (*machine.kernel)();
  happens_before(&machine.order);
  machine.current->state = State::done;
  to_scheduler();
}

EMULATOR_UNWATCHED inline void to_thread(Thread& thread) {
  machine.current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.main_fake_stack, thread.stack, kStack);
#endif
  if (_setjmp(machine.scheduler) == 0) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(thread.fiber, thread.started ? __tsan_switch_to_fiber_no_sync : 0);
#endif
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
}

EMULATOR_UNWATCHED inline void wait(State state, unsigned mask, const char* place, char* order) {
  Thread& self = *machine.current;
  self.state = state;
  self.mask = mask;
  self.place = place;
  happens_before(order);
  to_scheduler();
  happens_after(order);
}

EMULATOR_UNWATCHED inline void barrier(const char* place) { wait(State::at_barrier, 0, place, &machine.order); }

EMULATOR_UNWATCHED inline void meet_warp(unsigned mask, const char* place) {
  if (!(mask >> lane() & 1))
    machine.current->mask = mask, machine.current->place = place, fail("a lane outside its own mask");
  wait(State::at_warp, mask, place, &warp().order);
}

// Lets the lanes go on whose whole mask has met; returns whether there were any.
EMULATOR_UNWATCHED inline bool release_warp(unsigned first) {
  const unsigned lanes = std::min(kWarpSize, machine.count - first);
  bool released = false;
  for (unsigned i = 0; i < lanes; ++i) {
    Thread& thread = machine.block->threads[first + i];
    if (thread.state != State::at_warp) continue;
    const unsigned mask = thread.mask;
    bool met = true;
    for (unsigned k = 0; k < kWarpSize; ++k) {
      if (!(mask >> k & 1)) continue;
      if (k >= lanes) fail("a mask names lanes beyond the block");
      const Thread& other = machine.block->threads[first + k];
      if (other.state == State::done) fail("a mask names a lane that has returned");
      if (other.state == State::at_barrier) fail("a mask names a lane that waits at a barrier");
      if (other.state == State::at_warp && (other.place != thread.place || other.mask != mask))
        fail("lanes of a mask meet at different calls");
      met &= other.state == State::at_warp;
    }
    if (!met) continue;
    Warp& warp = machine.block->warps[first / kWarpSize];
    for (unsigned k = 0; k < lanes; ++k)
      if (mask >> k & 1) warp.taken[k] = warp.given[k], machine.block->threads[first + k].state = State::ready;
    released = true;
  }
  return released;
}

EMULATOR_UNWATCHED inline void release_barrier() {
  const char* place = nullptr;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.block->threads[i];
    if (thread.state == State::done) fail("a barrier that some threads have returned before");
    if (place && thread.place != place) fail("threads wait at different barriers");
    place = thread.place;
  }
  for (unsigned i = 0; i < machine.count; ++i) machine.block->threads[i].state = State::ready;
}

inline void global_memory(char* memory, size_t size) { machine.global[memory] = size; }

struct Shared {
  char* data = nullptr;
  size_t size = 0;
};
// The shared memory of all kernels: what is thread-local in the executable.
inline const Shared& shared_memory() {
  static const Shared memory = [] {
    Shared found;
    if (!EMULATOR_SANITIZED)
      dl_iterate_phdr(
          [](dl_phdr_info* info, size_t, void* result) {
            for (int i = 0; i < info->dlpi_phnum; ++i)
              if (info->dlpi_phdr[i].p_type == PT_TLS)
                *static_cast<Shared*>(result) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
            return 1;  // the executable is the first
          },
          &found);
    return found;
  }();
  return memory;
}

// Calls with each piece of global memory and where it begins in a copy of all.
template <typename Call> void each_piece(const Call& call) {
  size_t at = 0;
  for (const auto& [memory, size] : machine.global) call(memory, at, size), at += size;
}
inline void keep(std::vector<char>& copy) {
  each_piece([&](char* memory, size_t at, size_t size) {
    copy.resize(at + size);
    std::memcpy(copy.data() + at, memory, size);
  });
}
inline void restore(const std::vector<char>& copy) {
  each_piece([&](char* memory, size_t at, size_t size) { std::memcpy(memory, copy.data() + at, size); });
}

// Calls with the place and value of every byte that the running block has written since its last fence.
template <typename Call> void each_unfenced(const Call& call) {
  each_piece([&](char* memory, size_t at, size_t size) {
    const std::vector<char>& fenced = machine.block->fenced;
    if (!std::memcmp(memory, fenced.data() + at, size)) return;
    for (size_t i = 0; i < size; ++i)
      if (memory[i] != fenced[at + i]) call(at + i, memory[i]);
  });
}

// A thread lets others go first, of its block and of others.
EMULATOR_UNWATCHED inline void yield() {
  machine.yielded = true;
  to_scheduler();
}

inline void fence() {
  if (machine.at_a_time == 1) return;
  each_unfenced([](size_t at, char value) { machine.published[at] = value; });
  restore(machine.published);
  machine.block->fenced = machine.published;
  yield();
}

// Where an address of global memory is in copies of all; −1 of other memory, and where blocks do not run together.
inline int64_t published_at(const void* address) {
  int64_t found = -1;
  if (machine.at_a_time > 1)
    each_piece([&](char* memory, size_t at, size_t size) {
      const char* byte = static_cast<const char*>(address);
      if (memory <= byte && byte < memory + size) found = int64_t(at + (byte - memory));
    });
  return found;
}

template <typename T> T atomic_add(T* target, T value) {
  const int64_t at = published_at(target);
  if (at < 0) return __atomic_fetch_add(target, value, __ATOMIC_ACQ_REL);
  T before;
  std::memcpy(&before, &machine.published[at], sizeof(T));
  *target = before + value;
  for (auto* copy : {&machine.published, &machine.block->fenced}) std::memcpy(&(*copy)[at], target, sizeof(T));
  yield();
  return before;
}

// What an addition is that is not atomic.
template <typename T> T torn_add(T* target, T value) {
  const T before = *target;
  yield();
  *target = before + value;
  return before;
}

// Which of the faults of tests/mutants.py there is.
inline int mutant() {
  static const int number = std::getenv("EMULATOR_MUTANT") ? std::atoi(std::getenv("EMULATOR_MUTANT")) : 0;
  return number;
}
template <typename T> T add(int number, T* target, T value) {
  return mutant() == number ? torn_add(target, value) : atomic_add(target, value);
}

// Another block is about to run.
inline void suspend() {
  if (machine.at_a_time == 1 || !machine.block->running) return;
  machine.block->shared.assign(shared_memory().data, shared_memory().data + shared_memory().size);
  keep(machine.block->view);
}

inline void resume(Block& block) {
  if (machine.block == &block) return;
  suspend();
  machine.block = &block;
  blockIdx.x = block.index;
  std::memcpy(shared_memory().data, block.shared.data(), block.shared.size());
  restore(block.view);
}

EMULATOR_UNWATCHED inline void start(Block& block, unsigned index) {
  suspend();
  if (shared_memory().size) std::memset(shared_memory().data, 0xAB, shared_memory().size);
  if (machine.at_a_time > 1) restore(block.fenced = machine.published);
  machine.block = &block;
  block.running = true;
  blockIdx.x = block.index = index;
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    thread.state = State::ready;
    thread.started = false;
    thread.mask = 0;
    thread.place = nullptr;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_kernel, 0);
  }
}

// Every thread of the running block that is ready goes on until it waits.
EMULATOR_UNWATCHED inline void advance(const std::vector<unsigned>& turns) {
  Block& block = *machine.block;
  for (unsigned i : turns)
    if (block.threads[i].state == State::ready) to_thread(block.threads[i]);
  bool released = false, all_done = true;
  for (unsigned first = 0; first < machine.count; first += kWarpSize) released |= release_warp(first);
  for (unsigned i = 0; i < machine.count; ++i) {
    all_done &= block.threads[i].state == State::done;
    released |= block.threads[i].state == State::ready;  // it yielded
  }
  if (!all_done && !released) release_barrier();
  block.running = !all_done;
}

// Blocks in their order, at_a_time of them at once: now and then, and always where a thread yielded, another goes on.
inline void run_blocks(const std::vector<unsigned>& blocks, std::vector<unsigned>& turns, bool shuffle,
                       std::mt19937& random) {
  const bool together = machine.at_a_time > 1;
  if (together) keep(machine.published);
  machine.unfenced.clear();
  size_t started = 0;
  for (std::vector<Block*> running; started < blocks.size() || !running.empty();) {
    while (running.size() < machine.at_a_time && started < blocks.size()) {
      Block* next = machine.blocks;
      while (next->running) ++next;
      start(*next, blocks[started++]);
      running.push_back(next);
    }
    if (together) {
      if (!machine.block->running || machine.yielded || random() % 8 == 0) {
        const bool another = machine.yielded && running.size() > 1;
        Block* next = running[random() % running.size()];
        while (another && next == machine.block) next = running[random() % running.size()];
        resume(*next);
      }
      machine.yielded = false;
    }
    if (shuffle) std::shuffle(turns.begin(), turns.end(), random);
    advance(turns);
    if (machine.block->running) continue;
    running.erase(std::find(running.begin(), running.end(), machine.block));
    if (!together) continue;
    each_unfenced([](size_t at, char value) { machine.unfenced.emplace_back(at, value); });
    restore(machine.published);
  }
  if (!together) return;
  for (const auto& [at, value] : machine.unfenced) machine.published[at] = value;
  restore(machine.published);
}

template <typename... Parameters, typename... Arguments>
void launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const unsigned blocks = config.gridDim.x;
  blockIdx = dim3(0, 0, 0);
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  machine.count = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (machine.count == 0 || machine.count > kMostThreads || blocks == 0 || blocks > 0x7fffffffu)
    fail("a launch that CUDA refuses");
  if (config.gridDim.y * config.gridDim.z != 1 || config.dynamicSmemBytes != 0)
    fail("a launch that the emulator has not learnt");
  std::function<void()> call = [=] { kernel(Parameters(arguments)...); };
  machine.kernel = &call;
#if defined(__SANITIZE_THREAD__)
  machine.main_fiber = __tsan_get_current_fiber();
#endif
  if (const char* wish = std::getenv("EMULATOR_BLOCKS"); wish && !EMULATOR_SANITIZED)
    machine.at_a_time = unsigned(std::atoi(wish));
  if (machine.at_a_time < 1 || machine.at_a_time > kMostBlocks) fail("more blocks at a time than it can");
  machine.block = machine.blocks;
  for (unsigned b = 0; b < machine.at_a_time; ++b)
    for (unsigned i = 0; i < machine.count; ++i) {
      Thread& thread = machine.blocks[b].threads[i];
      if (thread.stack) continue;
      thread.stack = static_cast<char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (thread.stack == MAP_FAILED) fail("no memory for a stack");
#if defined(__SANITIZE_THREAD__)
      thread.fiber = __tsan_create_fiber(0);
#endif
    }
  const char* wish = std::getenv("EMULATOR_ORDER");
  const std::string order = wish ? wish : "forward";
  const bool shuffle = order != "forward" && order != "reverse";
  std::mt19937 random(shuffle ? unsigned(std::stoul(order)) : 0);
  std::vector<unsigned> block_turns(blocks), turns(machine.count);
  for (unsigned i = 0; i < blocks; ++i) block_turns[i] = order == "reverse" ? blocks - 1 - i : i;
  for (unsigned i = 0; i < machine.count; ++i) turns[i] = order == "reverse" ? machine.count - 1 - i : i;
  if (shuffle) std::shuffle(block_turns.begin(), block_turns.end(), random);
  happens_before(&machine.order);
  run_blocks(block_turns, turns, shuffle, random);
  happens_after(&machine.order);
}

// What every warp intrinsic does: bring a value, meet the lanes of the mask, read another lane's.
template <typename T>
EMULATOR_UNWATCHED T exchange(unsigned mask, T value, unsigned from, const char* place) {
  static_assert(sizeof(T) <= 8, "the intrinsics take 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  warp().given[lane()] = bits;
  meet_warp(mask, place);
  if (!(mask >> from & 1)) fail("a lane reads one outside the mask");
  std::memcpy(&value, &warp().taken[from], sizeof(T));
  return value;
}

EMULATOR_UNWATCHED inline unsigned ballot(unsigned mask, bool vote, const char* place) {
  exchange(mask, unsigned(vote), lane(), place);
  unsigned votes = 0;
  for (unsigned k = 0; k < kWarpSize; ++k)
    if (mask >> k & 1) votes |= unsigned(warp().taken[k] != 0) << k;
  return votes;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())

#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define EMULATOR_PLACE __FILE__ ":" EMULATOR_TEXT(__LINE__)
#define __syncthreads() emulator::barrier([] { static const char place[] = EMULATOR_PLACE; return place; }())
#define __shfl_xor_sync(mask, value, flip) \
  emulator::exchange(mask, value, emulator::lane() ^ unsigned(flip), EMULATOR_PLACE)
#define __shfl_up_sync(mask, value, distance) \
  emulator::exchange(mask, value, emulator::lane() - (emulator::lane() < unsigned(distance) ? 0 : unsigned(distance)), \
                     EMULATOR_PLACE)
#define __ballot_sync(mask, vote) emulator::ballot(mask, vote, EMULATOR_PLACE)
#define __all_sync(mask, vote) (emulator::ballot(mask, vote, EMULATOR_PLACE) == (mask))

inline void __threadfence() { emulator::fence(); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline int atomicAdd(int* target, int value) { return emulator::atomic_add(target, value); }
inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  return emulator::atomic_add(target, value);
}
// Compiled without -march these are separate instructions on x86-64; elsewhere a compiler might fuse them.
inline double __dmul_rn(double x, double y) {
  volatile double product = x * y;
  return product;
}
inline double __dadd_rn(double x, double y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __double2float_rd(double x) {
  const float nearest = float(x);
  return nearest > x ? std::nextafter(nearest, -HUGE_VALF) : nearest;
}
inline float __double2float_ru(double x) { return -__double2float_rd(-x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
using std::isfinite;
using std::isnan;

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::launch(*config, kernel, std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
