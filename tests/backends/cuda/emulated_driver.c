/* NVIDIA's driver and runtime library as a CPU has them, as much as TVM calls: one device of capability 8.7.
   Memory begins as not-a-number. A module is the path of a library, a kernel its function emulate_NAME. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
} Config;

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : 7;
  return 0;
}
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "emulated") < 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuGetErrorName(int error, const char** name) {
  *name = "error";
  return 0;
}
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(image, RTLD_NOW);
  if (!*module) fprintf(stderr, "%s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  char symbol[1024];
  snprintf(symbol, sizeof symbol, "emulate_%s", name);
  *function = dlsym(module, symbol);
  return *function ? 0 : 500;
}
int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  if (config->grid[1] != 1 || config->grid[2] != 1 || config->block[1] != 1 || config->block[2] != 1) return 1;
  ((void (*)(void**, unsigned, unsigned))function)(arguments, config->grid[0], config->block[0]);
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 801; }

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  *value = 1024;
  return 0;
}
int cudaMalloc(void** pointer, size_t size) {
  if (posix_memalign(pointer, 256, size + 256)) return 2;
  memset(*pointer, 0xFF, size + 256);
  return 0;
}
int cudaFree(void* pointer) {
  free(pointer);
  return 0;
}
int cudaMallocHost(void** pointer, size_t size) { return cudaMalloc(pointer, size); }
int cudaFreeHost(void* pointer) { return cudaFree(pointer); }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
int cudaGetDeviceProperties(void* properties, int device) { return 1; }
const char* cudaGetErrorName(int error) { return "error"; }
const char* cudaGetErrorString(int error) { return "error"; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaMemGetInfo(size_t* free_, size_t* total) {
  *free_ = *total = (size_t)1 << 30;
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
  memcpy(to, from, size);
  return 0;
}
int cudaMemcpyPeerAsync(void* to, int a, const void* from, int b, size_t size, void* stream) {
  memcpy(to, from, size);
  return 0;
}
int cudaSetDevice(int device) { return device; }
int cudaStreamSynchronize(void* stream) { return 0; }
#define UNUSED(name) \
  int name(void) { return 801; }
UNUSED(cudaEventCreate)
UNUSED(cudaEventDestroy)
UNUSED(cudaEventElapsedTime)
UNUSED(cudaEventRecord)
UNUSED(cudaEventSynchronize)
UNUSED(cudaGraphDestroy)
UNUSED(cudaGraphExecDestroy)
UNUSED(cudaGraphInstantiate)
UNUSED(cudaGraphLaunch)
UNUSED(cudaStreamBeginCapture)
UNUSED(cudaStreamCreate)
UNUSED(cudaStreamCreateWithFlags)
UNUSED(cudaStreamDestroy)
UNUSED(cudaStreamEndCapture)
UNUSED(cudaStreamWaitEvent)
