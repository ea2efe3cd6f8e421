// cuBLAS on the imitated CUDA runtime: products are counted, and computed by imitation.py. Also as cuBLASLt.
#include <cstdlib>
#include <cstring>

extern "C" {

void imitation_enqueue(void* stream, const char* kind, long number);

struct Handle {
  void* stream;
  int math_mode, pointer_mode;
};

#ifndef IS_CUBLASLT

int cublasCreate_v2(Handle** handle) { return *handle = new Handle{}, 0; }
int cublasDestroy_v2(Handle* handle) { return delete handle, 0; }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, 0; }
int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
int cublasGetMathMode(Handle* handle, int* mode) { return *mode = handle->math_mode, 0; }
int cublasSetMathMode(Handle* handle, int mode) { return handle->math_mode = mode, 0; }
int cublasGetPointerMode_v2(Handle* handle, int* mode) { return *mode = handle->pointer_mode, 0; }
int cublasSetPointerMode_v2(Handle* handle, int mode) { return handle->pointer_mode = mode, 0; }

#define PRODUCT(name) \
  int name(Handle* handle, ...) { return imitation_enqueue(handle->stream, "kernel", -1), 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

#else

static int make(void** object) { return *object = malloc(8), 0; }
size_t cublasLtGetVersion() { return 130000; }
int cublasLtMatmulDescCreate(void** object) { return make(object); }
int cublasLtMatmulPreferenceCreate(void** object) { return make(object); }
int cublasLtMatrixLayoutCreate(void** object) { return make(object); }
int cublasLtMatmulDescDestroy(void* object) { return free(object), 0; }
int cublasLtMatmulPreferenceDestroy(void* object) { return free(object), 0; }
int cublasLtMatrixLayoutDestroy(void* object) { return free(object), 0; }
int cublasLtMatmulDescSetAttribute() { return 0; }
int cublasLtMatmulPreferenceSetAttribute() { return 0; }
int cublasLtMatrixLayoutSetAttribute() { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
  memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t
  return *count = 1, 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, void* stream) {
  return imitation_enqueue(stream, "kernel", -1), 0;
}

#endif

}  // extern "C"
