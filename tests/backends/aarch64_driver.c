// Runs the kernels of one compiled program in order, without TVM's runtime: a statically linked program for an emulator.
// "calls.h" is written for each program: its buffers (BUFFERS), which of them are read first (READ), the kernel calls
// (CALLS) and which buffer is the result (WRITE). Numbers come from stdin and go to stdout.
#include <dlpack/dlpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void* sync;
  int32_t tasks;
} Environment;

typedef int (*Task)(int number, Environment* environment, void* data);
typedef int Kernel(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

// Pointers that the compiled object defines where it needs them.
extern __attribute__((weak)) int (*__TVMBackendParallelLaunch)(Task, void*, int);
extern __attribute__((weak)) void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern __attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void*);

static int launch(Task task, void* data, int tasks) {
  Environment environment = {NULL, tasks ? tasks : 2};
  for (int number = 0; number < environment.tasks; number++)
    if (task(number, &environment, data)) return -1;
  return 0;
}

static void* allocate(int device, int id, uint64_t bytes, int code, int bits) {
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int release(int device, int id, void* pointer) {
  free(pointer);
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t number = 0; number < count; number++) fputs(parts[number] ? parts[number] : "", stderr);
}

static void call(Kernel* kernel, int count, DLTensor** tensors) {
  TVMFFIAny arguments[64] = {0}, result = {0};
  for (int number = 0; number < count; number++) {
    arguments[number].type_index = kTVMFFIDLTensorPtr;
    arguments[number].v_ptr = tensors[number];
  }
  if (kernel(NULL, arguments, count, &result)) exit(2);
}

#define WIDTH(t) ((t)->dtype.bits / 8)

#include "calls.h"

Kernel __tvm_ffi_graphopt_set_denormals;

int main(void) {
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
  TVMFFIAny asked[2] = {{0}, {0}}, result = {0};  // whether to flush, and of how many threads
  asked[0].type_index = asked[1].type_index = kTVMFFIInt;
  asked[1].v_int64 = 1;
  for (asked[0].v_int64 = 0; asked[0].v_int64 < 2; asked[0].v_int64++) {
    uint64_t control;
    if (__tvm_ffi_graphopt_set_denormals(NULL, asked, 2, &result)) exit(3);
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    if ((control >> 24 & 1) != asked[0].v_int64) exit(4);
  }
  for (unsigned number = 0; number < sizeof(READ) / sizeof(*READ); number++)
    if (fread(READ[number]->data, WIDTH(READ[number]), COUNT(READ[number]), stdin) != COUNT(READ[number])) exit(5);
  CALLS;
  return fwrite((&WRITE)->data, WIDTH(&WRITE), COUNT(&WRITE), stdout) != COUNT(&WRITE);
}
