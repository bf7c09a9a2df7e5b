// Kernels with a fault planted, each to be caught by the emulator or a sanitizer; `none` is the same work done right.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

enum Fault {
  none, missing_barrier, read_beyond_global, write_beyond_global, read_beyond_shared, divergent_barrier, early_return,
  lane_outside_mask, lane_has_returned, lane_at_barrier, read_outside_mask, different_intrinsics, unwritten_output,
  unwritten_shared, signed_overflow, misaligned, faults
};
const char* const kNames[] = {
    "none", "missing_barrier", "read_beyond_global", "write_beyond_global", "read_beyond_shared", "divergent_barrier",
    "early_return", "lane_outside_mask", "lane_has_returned", "lane_at_barrier", "read_outside_mask",
    "different_intrinsics", "unwritten_output", "unwritten_shared", "signed_overflow", "misaligned"};

constexpr int kThreads = 64;

// out[i] = x[reversed i] + Σ over the warp of the lane numbers; a block reverses its 64 elements in shared memory.
template <int kFault>
__global__ void work(const int* x, int* out) {
  __shared__ int reversed[kThreads];
  const int t = threadIdx.x, lane = t % 32;
  const unsigned all = 0xffffffffu;
  if ((kFault == early_return || kFault == lane_has_returned) && t == 40) return;
  const int i = int(blockIdx.x) * kThreads + t;
  if (kFault != unwritten_shared || t != 5) reversed[kThreads - 1 - t] = x[kFault == read_beyond_global ? i + 1 : i];
  if (kFault == divergent_barrier && t >= 32) {
    __syncthreads();
  } else if (kFault != missing_barrier && kFault != lane_has_returned) {
    __syncthreads();
  }
  const int* const mirror = reversed;
  int value = mirror[kFault == read_beyond_shared ? t + 1 : t];
  if (kFault == lane_at_barrier && lane == 3) __syncthreads();
  int sum = lane;
  for (int flip = 16; flip; flip /= 2) {
    unsigned mask = all;
    if (kFault == lane_outside_mask && lane == 8) mask = 0xff;
    if (kFault == read_outside_mask) mask = lane < 16 ? 0xffffu : 0xffff0000u;
    if (kFault == different_intrinsics && lane < 16)
      __ballot_sync(all, true);
    else
      sum += __shfl_xor_sync(mask, sum, flip);
  }
  if (kFault == signed_overflow) value += 0x7fffffff;
  if (kFault == misaligned) value += *reinterpret_cast<const int*>(reinterpret_cast<const char*>(x) + 1);
  if (kFault == unwritten_output && t == 9) return;
  out[kFault == write_beyond_global ? i + 1 : i] = value + sum;
}

template <int kFault>
void launch(const int* x, int* out, int n) {
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(n / kThreads);
  launch.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(&launch, work<kFault>, x, out);
}

template <int kFault = 0>
void launch_named(const std::string& name, const int* x, int* out, int n) {
  if constexpr (kFault < faults) {
    if (name == kNames[kFault]) return launch<kFault>(x, out, n);
    return launch_named<kFault + 1>(name, x, out, n);
  }
  std::fprintf(stderr, "no fault is named %s\n", name.c_str());
  std::exit(2);
}

// Prints how many results are wrong.
int main(int, char** arguments) {
  const int n = 2 * kThreads;
  int* x = static_cast<int*>(std::malloc(n * sizeof(int)));
  int* out = static_cast<int*>(std::malloc(n * sizeof(int)));
  std::memset(out, 0xAB, n * sizeof(int));
  for (int i = 0; i < n; ++i) x[i] = 10 * i;
  launch_named(arguments[1], x, out, n);
  int wrong = 0;
  for (int i = 0; i < n; ++i) wrong += out[i] != 10 * (i / kThreads * kThreads + kThreads - 1 - i % kThreads) + 31 * 16;
  std::printf("%d\n", wrong);
  std::free(x);
  std::free(out);
}
