// Threads for the CPU kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace pyfast_ppo {

// Calls worker() on up to num_threads threads at once, the calling one among them, and returns when all are done.
//
// Inside a process that has loaded torch, the threads are torch's own OpenMP threads: a second pool would fight with
// the first for the same cores, because idle OpenMP threads spin. Without them (another OpenMP runtime, or a child
// after fork(), where libgomp's threads no longer exist and a parallel region would wait for them for ever) threads are
// started for the call. The work must not depend on how many threads there are.
void run_on_threads(int num_threads, const std::function<void()>& worker);

// To be called once, when the library is loaded: a child of fork() then knows that it is one.
void watch_for_fork();

// Whether run_on_threads uses torch's OpenMP threads: "openmp" or "std::thread".
const char* threading_name();

// Calls task(i, scratch) for i in [0, tasks) on up to num_threads threads. scratch has scratch_size elements of T and
// belongs to the thread. Which thread takes which task is left to chance: a task must leave its result in its own
// place.
template <class T, class Task>
void for_each_task(int64_t tasks, int num_threads, int64_t scratch_size, const Task& task) {
  const int threads = tasks < num_threads ? static_cast<int>(tasks) : num_threads;
  const std::unique_ptr<T[]> scratch(
      new T[static_cast<size_t>(threads * scratch_size)]);  // no zeros: tasks write first
  std::atomic<int64_t> next_task{0};
  std::atomic<int64_t> next_slot{0};
  run_on_threads(threads, [&] {
    const int64_t slot = next_slot.fetch_add(1, std::memory_order_relaxed);
    if (slot >= threads) return;
    for (int64_t i; (i = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      task(i, scratch.get() + slot * scratch_size);
    }
  });
}

}  // namespace pyfast_ppo
