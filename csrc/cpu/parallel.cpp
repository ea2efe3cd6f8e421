#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pyfast_ppo {

namespace {

// The entry point that GCC's "#pragma omp parallel" compiles to; LLVM's and Intel's runtimes have it, too.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

std::atomic<bool> in_forked_child{false};

GompParallel find_torch_openmp() {
#if defined(__linux__)
  // RTLD_NOLOAD: only if torch is there. dlsym looks in its dependencies, so this is the very runtime that torch uses.
  if (void* torch_library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    return reinterpret_cast<GompParallel>(dlsym(torch_library, "GOMP_parallel"));
  }
#endif
  return nullptr;
}

GompParallel torch_openmp() {
  static const GompParallel entry = find_torch_openmp();
  return in_forked_child.load() ? nullptr : entry;
}

void call_worker(void* worker) { (*static_cast<const std::function<void()>*>(worker))(); }

}  // namespace

void run_on_threads(int num_threads, const std::function<void()>& worker) {
  if (num_threads <= 1) {
    worker();
    return;
  }
  if (GompParallel parallel = torch_openmp()) {
    parallel(call_worker, const_cast<std::function<void()>*>(&worker), static_cast<unsigned>(num_threads), 0);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_threads) - 1);
  try {
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(worker);
  } catch (const std::system_error&) {
    // no more threads to be had: those that started, and this one, do the work
  }
  worker();
  for (std::thread& thread : threads) thread.join();
}

void watch_for_fork() {
#if defined(__linux__)
  pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif
}

const char* threading_name() { return torch_openmp() != nullptr ? "openmp" : "std::thread"; }

}  // namespace pyfast_ppo
