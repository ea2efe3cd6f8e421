#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyfast_ppo {

namespace {

Isa supported_isa() {
#if defined(PYFAST_PPO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa chosen_isa() {
  const Isa supported = supported_isa();
  const char* wish = std::getenv("PYFAST_PPO_ISA");
  if (wish == nullptr) return supported;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2}) {
    if (std::strcmp(wish, isa_name(isa)) == 0 && isa < supported) return isa;
  }
  return supported;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace pyfast_ppo
