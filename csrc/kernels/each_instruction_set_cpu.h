// Includes LOOPS, a header without guard, once for each instruction set. It finds
//   SET           the namespace for what it defines, within mgn
//   TARGET        the function attribute that switches the instruction set on
//   VECTOR_BYTES  a register's size
//   REGISTERS     how many of them there are
#if defined(__x86_64__)
#define SET avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma")))
#define VECTOR_BYTES 64
#define REGISTERS 32
#include LOOPS
#undef SET
#undef TARGET
#undef VECTOR_BYTES
#undef REGISTERS
#define SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define REGISTERS 16
#include LOOPS
#undef SET
#undef TARGET
#undef VECTOR_BYTES
#undef REGISTERS
#define OF_EACH_INSTRUCTION_SET(name) &avx512::name, &avx2::name, &baseline::name
#else
#define OF_EACH_INSTRUCTION_SET(name) &baseline::name
#endif
#define SET baseline
#define TARGET
#define VECTOR_BYTES 16
#define REGISTERS 16
#include LOOPS
#undef SET
#undef TARGET
#undef VECTOR_BYTES
#undef REGISTERS
