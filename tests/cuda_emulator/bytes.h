// Arrays of the drivers, raw from standard input and to standard output. Each is an allocation of its own, so that
// AddressSanitizer sees its ends, and results start as 0xAB bytes.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

inline void forget(char* bytes) {
  emulator::machine.global.erase(bytes);
  std::free(bytes);
}
using Bytes = std::unique_ptr<char, decltype(&forget)>;

inline Bytes poisoned(size_t size) {
  Bytes bytes(static_cast<char*>(std::malloc(size)), forget);
  emulator::global_memory(bytes.get(), size);
  std::memset(bytes.get(), 0xAB, size);
  return bytes;
}
inline Bytes read(size_t size) {
  Bytes bytes = poisoned(size);
  if (std::fread(bytes.get(), 1, size, stdin) != size) std::abort();
  return bytes;
}
inline void write(const Bytes& bytes, size_t size) { std::fwrite(bytes.get(), 1, size, stdout); }
template <typename T>
T* as(const Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.get());
}
