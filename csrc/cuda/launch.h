// Where a kernel runs.
#pragma once

#include <string>

namespace pyfast_ppo::cuda {

// The caller has made the device the thread's current one, by the runtime that it uses itself: this one would not know
// what to set it back to.
struct Stream {
  int device;    // its number among the visible ones
  void* handle;  // cudaStream_t; null: the default stream
};

// Blocks of `threads_per_block` threads of which `blocks_per_processor` are on one multiprocessor at a time: how many
// the device holds at once. Throws std::runtime_error if the device cannot be asked.
int64_t resident_blocks(int device, int blocks_per_processor);

// Why kernels cannot run on this machine (no GPU, a driver that is too old, no code for the GPU), or an empty string.
std::string unavailable_reason();

}  // namespace pyfast_ppo::cuda
