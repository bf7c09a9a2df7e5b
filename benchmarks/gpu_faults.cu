// A fault for each tool of compute-sanitizer, in a kernel whose name its filter selects: benchmarks.gpu_faults.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace mgn {
namespace {

constexpr int kThreads = 64;

__global__ void memcheck(int* out) { out[threadIdx.x + 1] = int(threadIdx.x); }  // the last one writes behind it

__global__ void racecheck(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];  // another warp's, without a barrier
}

__global__ void initcheck(int* out) { out[threadIdx.x] += 1; }  // nothing has been written there

__global__ void synccheck(int* out) {
  if (threadIdx.x < kThreads / 4) __syncthreads();  // half of a warp
  out[threadIdx.x] = 1;
}

}  // namespace
}  // namespace mgn

int main(int, char** arguments) {
  int* out = nullptr;
  const char* tool = arguments[1];
  if (cudaMalloc(&out, mgn::kThreads * sizeof(int)) != cudaSuccess) return 2;
  if (std::strcmp(tool, "initcheck") != 0) cudaMemset(out, 0, mgn::kThreads * sizeof(int));
  if (std::strcmp(tool, "memcheck") == 0) mgn::memcheck<<<1, mgn::kThreads>>>(out);
  if (std::strcmp(tool, "racecheck") == 0) mgn::racecheck<<<1, mgn::kThreads>>>(out);
  if (std::strcmp(tool, "initcheck") == 0) mgn::initcheck<<<1, mgn::kThreads>>>(out);
  if (std::strcmp(tool, "synccheck") == 0) mgn::synccheck<<<1, mgn::kThreads>>>(out);
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;  // whatever the tool finds is its own exit status
}
