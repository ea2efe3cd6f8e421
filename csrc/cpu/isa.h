// One kernel source, compiled for several instruction sets and chosen at run time.
//
// Usage, in a .cpp file:
//   #define PYFAST_PPO_KERNEL "ppo_loss_kernel.inl"
//   #include "for_each_isa.h"
// includes the kernel once per instruction set, each time inside a namespace of that name; then
//   PYFAST_PPO_DISPATCH(T, run_chunk(arguments))
// calls the best one that this machine can run. For double that is the baseline: it is there to check float, and
// compiling it three times would double the build's time.
//
// Why pragmas and not -mavx2 on a whole file: the standard library's inline functions would be compiled for AVX2 too,
// and the linker might keep that copy for everybody.
#pragma once

#include <type_traits>

namespace pyfast_ppo {

// Sums run in this many partial sums, whatever the instruction set; rows may be written in whole vectors of this
// length.
constexpr int kLanes = 16;

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa best_isa();             // what this machine has; PYFAST_PPO_ISA=baseline|avx2|avx512 in the environment lowers it
const char* isa_name(Isa);  // "baseline", "avx2", "avx512"

}  // namespace pyfast_ppo

#if (defined(__x86_64__) || defined(__amd64__)) && defined(__GNUC__)
#define PYFAST_PPO_X86 1
#define PYFAST_PPO_DISPATCH(T, call)                                                   \
  [&] {                                                                                \
    if constexpr (std::is_same_v<T, float>) {                                          \
      if (::pyfast_ppo::best_isa() == ::pyfast_ppo::Isa::kAvx512) return avx512::call; \
      if (::pyfast_ppo::best_isa() == ::pyfast_ppo::Isa::kAvx2) return avx2::call;     \
    }                                                                                  \
    return baseline::call;                                                             \
  }()
#else
#define PYFAST_PPO_DISPATCH(T, call) (baseline::call)
#endif
