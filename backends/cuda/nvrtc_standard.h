// What TVM's sources take of CUDA's C++ library under NVRTC, which comes in a package of its own.
#ifndef GRAPHOPT_STANDARD
#define GRAPHOPT_STANDARD
namespace cuda { namespace std {
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
template <bool B> struct truth { static constexpr bool value = B; };
template <typename A, typename B> struct is_same : truth<false> {};
template <typename A> struct is_same<A, A> : truth<true> {};
template <typename A, typename B> inline constexpr bool is_same_v = is_same<A, B>::value;
template <typename A> struct is_floating_point : truth<is_same_v<A, float> || is_same_v<A, double>> {};
template <typename A> struct is_integral;  // named by TVM, used by nobody here
template <typename A> struct is_signed;
template <typename A> struct is_unsigned;
template <bool B, typename A = void> struct enable_if {};
template <typename A> struct enable_if<true, A> { typedef A type; };
template <bool B, typename X, typename Y> struct conditional { typedef X type; };
template <typename X, typename Y> struct conditional<false, X, Y> { typedef Y type; };
}}
#endif
