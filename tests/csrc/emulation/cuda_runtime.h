// Stands in for CUDA's header of this name, so that a C++ compiler makes the .cu files into programs for the CPU: what
// indexes, tails, barriers and reductions do can then be tested, and watched by sanitizers, without a GPU.
//
// A block's threads are fibers that change over at barriers and shuffles only, each time in another random order: what
// depends on an order that no barrier imposes comes out differently from run to run. Blocks follow each other in random
// order, too. It knows what the kernels use, and no more; not the memory model.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_BEFORE_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define EMULATION_AFTER_SWITCH(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define EMULATION_BEFORE_SWITCH(save, bottom, size)
#define EMULATION_AFTER_SWITCH(save, bottom, size)
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned n) : x(n) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* sanitizer_stack = nullptr;
  State state = State::kReady;
  uint64_t shuffled[2] = {};  // what this thread gives to the others, in turns
  unsigned shuffles = 0;
};

// One grid at a time, as one thread of the host.
class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  bool idle = false;  // launches are taken, and nothing runs
  int64_t num_launches = 0;

  void run(dim3 grid, dim3 block, std::function<void()> kernel) {
    ++num_launches;
    if (idle) return;
    kernel_ = std::move(kernel);
    gridDim = grid;
    blockDim = block;
    while (fibers_.size() < block.x) {
      fibers_.emplace_back();
      fibers_.back().stack = std::make_unique<char[]>(kStack);
    }
    std::vector<unsigned> order = shuffled_range(grid.x);
    for (unsigned b : order) {
      blockIdx = dim3(b);
      run_block();
    }
  }

  // PYFAST_PPO_EMULATION_WITHOUT_BARRIER = "file.cu:line" leaves one out: a test has to notice.
  void block_barrier(const char* file, int line) {
    static const char* missing = std::getenv("PYFAST_PPO_EMULATION_WITHOUT_BARRIER");
    if (missing != nullptr) {
      const char* slash = std::strrchr(file, '/');
      const std::string place = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
      if (place == missing) return;
    }
    wait(State::kAtBlockBarrier);
  }

  uint64_t shuffle_xor(uint64_t value, int lane_mask) {
    Fiber& fiber = fibers_[current_];
    const unsigned turn = fiber.shuffles++ % 2;
    const unsigned peer = current_ ^ static_cast<unsigned>(lane_mask);
    fiber.shuffled[turn] = value;
    wait(State::kAtWarpBarrier);
    return fibers_[peer].shuffled[turn];
  }

 private:
  void run_block() {
    const unsigned n = blockDim.x;
    for (unsigned i = 0; i < n; ++i) start(fibers_[i]);
    for (;;) {
      bool any = false;
      for (unsigned i : shuffled_range(n)) {
        if (fibers_[i].state != State::kReady) continue;
        any = true;
        resume(i);
      }
      if (release(n)) continue;
      if (any) continue;
      const bool done =
          std::all_of(fibers_.begin(), fibers_.begin() + n, [](const Fiber& f) { return f.state == State::kDone; });
      if (done) return;
      std::fprintf(stderr, "emulation: the threads of a block wait for each other at different barriers\n");
      std::abort();
    }
  }

  void start(Fiber& fiber) {
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::enter, 0);
  }

  // Lets go the warps and the block that are complete at a barrier.
  bool release(unsigned n) {
    bool released = false;
    for (unsigned first = 0; first < n; first += kWarp) {
      const auto begin = fibers_.begin() + first, end = fibers_.begin() + std::min(first + kWarp, n);
      if (!std::all_of(begin, end, [](const Fiber& f) { return f.state == State::kAtWarpBarrier; })) continue;
      for (auto f = begin; f != end; ++f) f->state = State::kReady;
      released = true;
    }
    bool waiting = false;
    for (unsigned i = 0; i < n; ++i) {
      if (fibers_[i].state == State::kReady || fibers_[i].state == State::kAtWarpBarrier) return released;
      waiting = waiting || fibers_[i].state == State::kAtBlockBarrier;
    }
    if (!waiting) return released;
    for (unsigned i = 0; i < n; ++i) {
      if (fibers_[i].state == State::kAtBlockBarrier) fibers_[i].state = State::kReady;
    }
    return true;
  }

  void resume(unsigned i) {
    current_ = i;
    threadIdx = dim3(i);
    Fiber& fiber = fibers_[i];
    EMULATION_BEFORE_SWITCH(&scheduler_stack_, fiber.stack.get(), kStack);
    swapcontext(&scheduler_, &fiber.context);
    EMULATION_AFTER_SWITCH(scheduler_stack_, nullptr, nullptr);
  }

  void wait(State state) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    EMULATION_BEFORE_SWITCH(&fiber.sanitizer_stack, scheduler_bottom_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    EMULATION_AFTER_SWITCH(fiber.sanitizer_stack, nullptr, nullptr);
  }

  static void enter() {
    Machine& machine = get();
    EMULATION_AFTER_SWITCH(nullptr, &machine.scheduler_bottom_, &machine.scheduler_size_);
    machine.kernel_();
    Fiber& fiber = machine.fibers_[machine.current_];
    fiber.state = State::kDone;
    EMULATION_BEFORE_SWITCH(nullptr, machine.scheduler_bottom_, machine.scheduler_size_);
    setcontext(&machine.scheduler_);
  }

  std::vector<unsigned> shuffled_range(unsigned n) {
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  std::vector<Fiber> fibers_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  void* scheduler_stack_ = nullptr;
  unsigned current_ = 0;
  std::minstd_rand random_{std::getenv("PYFAST_PPO_EMULATION_SEED")
                               ? static_cast<unsigned>(std::atoi(std::getenv("PYFAST_PPO_EMULATION_SEED")))
                               : 1u};
};

}  // namespace emulation

// --- what kernels call -----------------------------------------------------------------------------------------------

#define __syncthreads() (::emulation::Machine::get().block_barrier(__FILE__, __LINE__))

template <class T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = ::emulation::Machine::get().shuffle_xor(bits, lane_mask);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline unsigned atomicInc(unsigned* to, unsigned most) {
  const unsigned before = *to;
  *to = before >= most ? 0 : before + 1;
  return before;
}

template <class T>
T atomicOr(T* to, T x) {
  const T before = *to;
  *to |= x;
  return before;
}

using std::max;
using std::min;

// --- what the host calls ---------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {};

namespace emulation {

// Who runs a kernel in place of the machine above, if anybody: (its address, blocks, threads, the bytes of each
// argument)
using Launcher = std::function<void(uintptr_t, unsigned, unsigned, const std::vector<std::string>&)>;
inline Launcher launcher;

// What this machine pretends to be, for the tests of what is said when something is missing.
struct Pretence {
  cudaError_t launch = cudaSuccess, devices = cudaSuccess, code = cudaSuccess;
  int driver = 13000, num_devices = 1;
};
inline Pretence pretence;

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidPtx:
      return "a PTX JIT compilation failed";
    case cudaErrorJitCompilerNotFound:
      return "PTX JIT compiler library not found";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    default:
      return "invalid configuration argument";
  }
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = emulation::pretence.num_devices, emulation::pretence.devices;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emulation::pretence.driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }

// Few processors: then a block has several tiles even of small inputs. Many: then the last block has many sums to read.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  static const char* processors = std::getenv("PYFAST_PPO_EMULATION_PROCESSORS");
  return *value = processors ? std::atoi(processors) : 2, cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return emulation::pretence.code;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (emulation::pretence.launch != cudaSuccess) return emulation::pretence.launch;
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (emulation::launcher) {
    const auto bytes = [](const auto& value) {
      return std::string(reinterpret_cast<const char*>(&value), sizeof value);
    };
    emulation::launcher(reinterpret_cast<uintptr_t>(kernel), config->gridDim.x, config->blockDim.x,
                        {bytes(static_cast<Parameters>(arguments))...});
    return cudaSuccess;
  }
  ::emulation::Machine::get().run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
  return cudaSuccess;
}
