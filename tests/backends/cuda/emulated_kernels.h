// CUDA C++ as C++ for a CPU: blocks one after the other, threads of a block as fibers that wait for each other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define __global__
#define __host__
#define alignas(count) __attribute__((aligned(count)))  // may stand behind "static"
#define __align__(count) alignas(count)
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(count)
#define __shared__ static
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

struct Place {
  int x;
};
static Place blockIdx, threadIdx;

inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline int __dp4a(int a, int b, int c) {
  for (int byte = 0; byte < 32; byte += 8) c += (int8_t)(a >> byte) * (int8_t)(b >> byte);
  return c;
}

// float16 as its bits, rounded to nearest even.
struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) {
    float size = std::fabs(x);
    int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    int number = size >= 65520 ? 0x7C00 : (exponent + 14) * 1024 + (int)lrintf(std::ldexp(size, 10 - exponent));
    bits = (std::signbit(x) ? 0x8000 : 0) | (std::isnan(x) ? 0x7E00 : number);
  }
  operator float() const {
    int exponent = bits >> 10 & 31, number = bits & 1023;
    float size = exponent == 31 ? (number ? NAN : INFINITY)
                                : std::ldexp(exponent ? number + 1024.0f : number, std::max(exponent, 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
};
using half = __half;
struct __half2 {
  __half x, y;
};
inline bool __hgt(__half a, __half b) { return (float)a > (float)b; }
inline bool __hlt(__half a, __half b) { return (float)a < (float)b; }
using std::max;
using std::min;

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> done;
static void (*body)();

static void fiber() {
  body();
  done[threadIdx.x] = 1;
  setcontext(&scheduler);
}
inline void __syncthreads() { swapcontext(&fibers[threadIdx.x], &scheduler); }

static void run(void (*kernel)(), unsigned grid, unsigned block, bool waits) {
  constexpr int kStack = 1 << 17;
  static std::vector<char> stacks;
  body = kernel;
  if (waits) stacks.resize((size_t)block * kStack);
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    if (!waits) {
      for (threadIdx.x = 0; threadIdx.x < (int)block; ++threadIdx.x) body();
      continue;
    }
    fibers.assign(block, {});
    done.assign(block, 0);
    for (unsigned t = 0; t < block; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[(size_t)t * kStack];
      fibers[t].uc_stack.ss_size = kStack;
      makecontext(&fibers[t], fiber, 0);
    }
    for (bool going = true; going;) {
      going = false;
      for (unsigned t = 0; t < block; ++t) {
        if (done[t]) continue;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t]);
        going |= !done[t];
      }
    }
  }
}
