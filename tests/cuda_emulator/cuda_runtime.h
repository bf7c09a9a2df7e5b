// Runs CUDA kernels on the host: put this folder on the include path and compile the .cu files with
// g++ -x c++ -U_FORTIFY_SOURCE.
//
// A CUDA thread is a fiber. The threads of a block take turns on one host thread and switch where they wait for each
// other; blocks run one after another. EMULATOR_ORDER is forward, reverse or a seed: the order of blocks, and of
// threads between two waits. A missing barrier shows in at least one order, and under ThreadSanitizer in every order.
// Shared memory starts each block as 0xAB bytes. The program aborts, naming reason and place, at a barrier that not all
// threads reach, at a warp intrinsic whose mask does not match its callers, and at a deadlock.
//
// Not covered: blocks that run at the same time, weak memory order, dynamic shared memory, inline PTX, tensor cores,
// speed. It has the intrinsics that the project's kernels use; a new one goes to the end of this file.
#pragma once
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
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx;

namespace emulator {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarpSize = 32, kMostThreads = 1024;

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

struct Machine {
  Thread threads[kMostThreads];
  Warp warps[kMostThreads / kWarpSize];
  unsigned count;
  Thread* current;
  std::function<void()>* kernel;
  jmp_buf scheduler;
  char order;  // as in Warp, of the whole block
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

EMULATOR_UNWATCHED inline unsigned number(const Thread& thread) { return unsigned(&thread - machine.threads); }
EMULATOR_UNWATCHED inline unsigned lane() { return number(*machine.current) % kWarpSize; }
EMULATOR_UNWATCHED inline Warp& warp() { return machine.warps[number(*machine.current) / kWarpSize]; }
EMULATOR_UNWATCHED inline const dim3& thread_index() { return machine.current->index; }

[[noreturn]] EMULATOR_UNWATCHED inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s, in block %u\n", what, blockIdx.x);
  const Thread* last = nullptr;
  for (unsigned i = 0; i < machine.count; ++i) {  // one line for each run of threads that are at the same place
    const Thread& t = machine.threads[i];
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
    Thread& thread = machine.threads[first + i];
    if (thread.state != State::at_warp) continue;
    const unsigned mask = thread.mask;
    bool met = true;
    for (unsigned k = 0; k < kWarpSize; ++k) {
      if (!(mask >> k & 1)) continue;
      if (k >= lanes) fail("a mask names lanes beyond the block");
      const Thread& other = machine.threads[first + k];
      if (other.state == State::done) fail("a mask names a lane that has returned");
      if (other.state == State::at_barrier) fail("a mask names a lane that waits at a barrier");
      if (other.state == State::at_warp && (other.place != thread.place || other.mask != mask))
        fail("lanes of a mask meet at different calls");
      met &= other.state == State::at_warp;
    }
    if (!met) continue;
    Warp& warp = machine.warps[first / kWarpSize];
    for (unsigned k = 0; k < lanes; ++k)
      if (mask >> k & 1) warp.taken[k] = warp.given[k], machine.threads[first + k].state = State::ready;
    released = true;
  }
  return released;
}

EMULATOR_UNWATCHED inline void release_barrier() {
  const char* place = nullptr;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state == State::done) fail("a barrier that some threads have returned before");
    if (place && thread.place != place) fail("threads wait at different barriers");
    place = thread.place;
  }
  for (unsigned i = 0; i < machine.count; ++i) machine.threads[i].state = State::ready;
}

EMULATOR_UNWATCHED inline void run_block(unsigned block, std::vector<unsigned>& turns, bool shuffle,
                                         std::mt19937& random) {
  blockIdx.x = block;
  for (volatile char* byte = __start_cuda_shared; byte != __stop_cuda_shared; ++byte) *byte = char(0xAB);
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
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
  for (;;) {
    if (shuffle) std::shuffle(turns.begin(), turns.end(), random);
    for (unsigned i : turns)
      if (machine.threads[i].state == State::ready) to_thread(machine.threads[i]);
    bool released = false, all_done = true;
    for (unsigned first = 0; first < machine.count; first += kWarpSize) released |= release_warp(first);
    for (unsigned i = 0; i < machine.count; ++i) all_done &= machine.threads[i].state == State::done;
    if (all_done) return;
    if (!released) release_barrier();
  }
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
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
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
  for (unsigned block : block_turns) run_block(block, turns, shuffle, random);
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

inline void __threadfence() {}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_ACQ_REL); }
inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  return __atomic_fetch_add(target, value, __ATOMIC_ACQ_REL);
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
