// What kernels call by name; `scalar_instructions` has the same for a CPU.
// All four products are signed and the sum wraps around (PTX ISA, dp4a).
__device__ __forceinline__ int graphopt_multiply_quads(int total, unsigned left, unsigned right) {
  return __dp4a((int)left, (int)right, total);
}
// Halves to even, as the CPU's instruction; CUDA's roundf goes away from zero.
__device__ __forceinline__ int graphopt_whole_1(float x) { return __float2int_rn(x); }
// The first where it is larger, so that a NaN on the right stays; fmaxf would lose it.
template <typename T> __device__ __forceinline__ T graphopt_max(T a, T b) { return a > b ? a : b; }
template <typename T> __device__ __forceinline__ T graphopt_min(T a, T b) { return a < b ? a : b; }
