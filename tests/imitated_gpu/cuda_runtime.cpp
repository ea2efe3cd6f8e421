// A CUDA runtime without a GPU, in the place of libcudart: torch's own host code runs on it. Memory is the host's,
// copies and fills are made, kernels are counted and do nothing. Capture follows the rules of the CUDA programming
// guide, so that what a GPU refuses to record is refused here. What computes in the kernels' place is imitation.py.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct Capture;
using Clock = std::map<CUstream_st*, long>;  // how much of each stream's work is known to be done

struct CUstream_st {
  bool legacy = false;  // the default stream, which cannot be captured
  Capture* capture = nullptr;
  Clock clock;
};
struct CUevent_st {
  Capture* capture = nullptr;
  Clock clock;
};
struct Node {
  std::string kind;
  std::function<void()> work;
};
struct CUgraph_st {
  std::vector<Node> nodes;
};
struct CUgraphExec_st {
  std::vector<Node> nodes;
};
struct Capture {
  CUgraph_st* graph;
  CUstream_st* origin;
  bool relaxed;
  unsigned long long id;
  Clock work;  // of each stream that takes part
  bool invalid = false;
};

namespace {

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local int captures_of_thread = 0;
unsigned long long num_captures = 0;
std::map<std::string, long> counts;
std::map<char*, size_t> allocations;
size_t used = 0;
constexpr size_t kTotal = size_t{141} << 30, kLargest = size_t{4} << 30;  // one larger is out of memory
void (*python)(long) = nullptr;

CUstream_st* of(cudaStream_t stream) {
  static CUstream_st legacy{true, nullptr, {}};
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread ? &legacy : stream;
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t invalidate(Capture* capture, cudaError_t error) {
  capture->invalid = true;
  ++counts["refused"];
  return fail(error);
}

// Something for the stream to do: recorded, or done at once.
cudaError_t enqueue(cudaStream_t where, const char* kind, std::function<void()> work) {
  const Lock lock(mutex);
  CUstream_st* const stream = of(where);
  if (Capture* const capture = stream->capture) {
    if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    stream->clock[stream] = ++capture->work[stream];
    capture->graph->nodes.push_back({kind, std::move(work)});
    return cudaSuccess;
  }
  ++counts[kind];
  if (work) work();
  return cudaSuccess;
}

// What may not be called by a thread that captures, unless it says that it knows.
bool is_unsafe_now() {
  const bool unsafe = captures_of_thread > 0 && thread_mode != cudaStreamCaptureModeRelaxed;
  if (unsafe) ++counts["refused"];
  return unsafe;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return fail(cudaErrorInvalidConfiguration);
  if (threads > 1024 || grid.y > 65535 || grid.z > 65535) return fail(cudaErrorInvalidConfiguration);
  if (shared > 232448) return fail(cudaErrorInvalidValue);
  return enqueue(stream, "kernel", nullptr);
}

cudaError_t wait_for(CUstream_st* stream) {
  const Lock lock(mutex);
  if (stream != nullptr && stream->capture) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
  if (stream == nullptr && is_unsafe_now()) return fail(cudaErrorStreamCaptureUnsupported);
  ++counts["wait"];
  return cudaSuccess;
}

void* memory_of(const void* variable, size_t size) {
  static std::map<const void*, void*> known;
  void*& memory = known[variable];
  if (memory == nullptr) memory = calloc(1, size);
  return memory;
}

std::unordered_map<const void*, size_t>& variables() {
  static auto* const sizes = new std::unordered_map<const void*, size_t>;  // registered before main
  return *sizes;
}

}  // namespace

extern "C" {

// --- for the tests

long imitation_count(const char* what) {
  const Lock lock(mutex);
  return counts[what];
}

void imitation_forget() {
  const Lock lock(mutex);
  counts.clear();
}

void imitation_set_python(void (*function)(long)) { python = function; }

// `number` for the function of imitation_set_python, when the stream is there
void imitation_enqueue(void* stream, const char* kind, long number) {
  enqueue(static_cast<cudaStream_t>(stream), kind, number < 0 ? std::function<void()>() : [number] { python(number); });
}

// --- kernels

void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t size, int, int) {
  variables()[variable] = size;
}
void __cudaRegisterManagedVar(void**, void** variable, char*, const char*, int, size_t size, int, int) {
  *variable = calloc(1, size);
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->numRegs = 32;
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t,
                                                                   unsigned) {
  *blocks = threads > 64 ? 2048 / threads : 32;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}

// --- the device, which calls itself one of compute capability 9.0

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values{
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrL2CacheSize, 50 << 20},
  };
  const auto known = values.find(attribute);
  *value = known == values.end() ? 1 : known->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {};
  strcpy(found->name, "Imitated GPU");
  found->totalGlobalMem = kTotal;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->totalConstMem = 65536;
  found->l2CacheSize = 50 << 20;
  found->textureAlignment = 512;
  found->unifiedAddressing = found->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  strncpy(text, "0000:00:00.0", size);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "an error of the imitated CUDA runtime"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    default:
      return "an error of the imitated CUDA runtime";
  }
}

// --- memory

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  const Lock lock(mutex);
  return *available = kTotal - used, *total = kTotal, cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t size) {
  const Lock lock(mutex);
  if (is_unsafe_now()) return fail(cudaErrorStreamCaptureUnsupported);
  if (size > kLargest) return fail(cudaErrorMemoryAllocation);
  *memory = aligned_alloc(512, (size + 511) / 512 * 512);
  memset(*memory, 0, size);
  allocations[static_cast<char*>(*memory)] = size;
  used += size;
  ++counts["malloc"];
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  const Lock lock(mutex);
  if (memory == nullptr) return cudaSuccess;
  if (is_unsafe_now()) return fail(cudaErrorStreamCaptureUnsupported);
  const auto found = allocations.find(static_cast<char*>(memory));
  if (found == allocations.end()) return fail(cudaErrorInvalidValue);
  used -= found->second;
  allocations.erase(found);
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned) {
  if (is_unsafe_now()) return fail(cudaErrorStreamCaptureUnsupported);
  *memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex);
  *attributes = {};
  const char* const address = static_cast<const char*>(pointer);
  auto after = allocations.upper_bound(const_cast<char*>(address));
  if (after != allocations.begin() && address < std::prev(after)->first + std::prev(after)->second) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return enqueue(stream, "copy", [=] { memcpy(to, from, size); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (is_unsafe_now()) return fail(cudaErrorStreamCaptureUnsupported);
  wait_for(nullptr);
  return cudaMemcpyAsync(to, from, size, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  return enqueue(stream, "fill", [=] { memset(memory, value, size); });
}
cudaError_t cudaMemset(void* memory, int value, size_t size) { return cudaMemsetAsync(memory, value, size, nullptr); }
cudaError_t cudaMemcpyToSymbol(const void* variable, const void* from, size_t size, size_t offset, cudaMemcpyKind) {
  memcpy(static_cast<char*>(memory_of(variable, variables()[variable])) + offset, from, size);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** memory, const void* variable) {
  return *memory = memory_of(variable, variables()[variable]), cudaSuccess;
}

// --- streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = new CUstream_st, cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = new CUstream_st, cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = new CUstream_st, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(of(stream)); }
cudaError_t cudaDeviceSynchronize() { return wait_for(nullptr); }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Lock lock(mutex);
  Capture* const capture = of(stream)->capture;
  return capture ? invalidate(capture, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  const Lock lock(mutex);
  event->capture = of(stream)->capture;
  event->clock = of(stream)->clock;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(mutex);
  if (event->capture) return invalidate(event->capture, cudaErrorCapturedEvent);
  return is_unsafe_now() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(mutex);
  if (event->capture) return invalidate(event->capture, cudaErrorCapturedEvent);
  ++counts["wait"];
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1e-3f, cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t where, cudaEvent_t event, unsigned) {
  const Lock lock(mutex);
  CUstream_st* const stream = of(where);
  if (event->capture == nullptr) {
    return stream->capture ? invalidate(stream->capture, cudaErrorStreamCaptureIsolation) : cudaSuccess;
  }
  if (stream->legacy) return invalidate(event->capture, cudaErrorStreamCaptureImplicit);
  if (stream->capture && stream->capture != event->capture) return fail(cudaErrorStreamCaptureMerge);
  if (!stream->capture) {
    stream->capture = event->capture;
    stream->clock = {{stream, ++event->capture->work[stream]}};
  }
  for (const auto& [other, done] : event->clock) stream->clock[other] = std::max(stream->clock[other], done);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream, "host function", [=] { function(data); });
}

// --- capture and graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t where, cudaStreamCaptureMode mode) {
  const Lock lock(mutex);
  CUstream_st* const stream = of(where);
  if (stream->legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  const bool relaxed = mode == cudaStreamCaptureModeRelaxed;
  stream->capture = new Capture{new CUgraph_st, stream, relaxed, ++num_captures, {{stream, 0}}};
  stream->clock = {{stream, 0}};
  captures_of_thread += !relaxed;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t where, cudaGraph_t* graph) {
  const Lock lock(mutex);
  CUstream_st* const stream = of(where);
  Capture* const capture = stream->capture;
  *graph = nullptr;
  if (capture == nullptr) return fail(cudaErrorIllegalState);
  if (capture->origin != stream) return fail(cudaErrorStreamCaptureUnmatched);
  bool joined = true;
  for (const auto& [other, work] : capture->work) {
    if (other != stream && stream->clock[other] < work) joined = false;
    if (other->capture == capture) other->capture = nullptr;
  }
  captures_of_thread -= !capture->relaxed;
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!joined) return fail(cudaErrorStreamCaptureUnjoined);
  *graph = capture->graph;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex);
  const Capture* const capture = of(stream)->capture;
  *status = cudaStreamCaptureStatusNone;
  if (capture) *status = capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  const Lock lock(mutex);
  const Capture* const capture = of(stream)->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? capture->graph : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new CUgraphExec_st{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  {
    const Lock lock(mutex);
    if (of(stream)->capture) return invalidate(of(stream)->capture, cudaErrorStreamCaptureUnsupported);
    ++counts["graph"];
    for (const Node& node : executable->nodes) ++counts["graph's " + node.kind];
  }
  for (const Node& node : executable->nodes) {  // without the lock: Python has one of its own
    if (node.work) node.work();
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
  if (nodes == nullptr) *num_nodes = graph->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
