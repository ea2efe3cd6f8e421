// Includes PYFAST_PPO_KERNEL once per instruction set (see isa.h). No include guard: each .cpp uses it for its own
// kernel.
#include "isa.h"

namespace pyfast_ppo {
namespace baseline {
#include PYFAST_PPO_KERNEL
}
}  // namespace pyfast_ppo

#if defined(PYFAST_PPO_X86)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace pyfast_ppo {
namespace avx2 {
#include PYFAST_PPO_KERNEL
}
}  // namespace pyfast_ppo
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
namespace pyfast_ppo {
namespace avx512 {
#include PYFAST_PPO_KERNEL
}
}  // namespace pyfast_ppo
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PYFAST_PPO_X86
#undef PYFAST_PPO_KERNEL
