// Arrays in memory that starts at multiples of 64 bytes, and the tensors of a safetensors member.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "json.hpp"

namespace graphopt {

constexpr size_t kAlignment = 64;

struct Dtype {
  const char* name;         // as the manifest spells it
  const char* safetensors;
  uint8_t code, bits;       // of DLPack
};

inline const std::vector<Dtype>& dtypes() {
  static const std::vector<Dtype> all = {
      {"float64", "F64", kDLFloat, 64},   {"float32", "F32", kDLFloat, 32}, {"float16", "F16", kDLFloat, 16},
      {"bfloat16", "BF16", kDLBfloat, 16}, {"int64", "I64", kDLInt, 64},     {"int32", "I32", kDLInt, 32},
      {"int16", "I16", kDLInt, 16},       {"int8", "I8", kDLInt, 8},        {"uint64", "U64", kDLUInt, 64},
      {"uint32", "U32", kDLUInt, 32},     {"uint16", "U16", kDLUInt, 16},   {"uint8", "U8", kDLUInt, 8},
      {"bool", "BOOL", kDLBool, 8},       {"float8_e4m3fn", "F8_E4M3", kDLFloat8_e4m3fn, 8},
      {"float8_e5m2", "F8_E5M2", kDLFloat8_e5m2, 8}};
  return all;
}

inline const Dtype& dtype_named(const std::string& name) {
  for (const Dtype& each : dtypes())
    if (name == each.name) return each;
  throw Error("dtype " + name.substr(0, 40) + " is not known to this runtime; package the artifact again");
}

using Shape = std::vector<int64_t>;

inline std::string spelled(const Shape& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Copies share their memory. `data` may lie in a mapped file, then nobody writes into it.
struct Tensor {
  std::string dtype;
  Shape shape;
  std::shared_ptr<void> data;

  Tensor() = default;
  Tensor(std::string dtype_, Shape shape_, std::shared_ptr<void> data_)
      : dtype(std::move(dtype_)), shape(std::move(shape_)), data(std::move(data_)) {}

  // Zeros in memory of its own.
  static Tensor zeros(std::string dtype, Shape shape) {
    Tensor made(std::move(dtype), std::move(shape), nullptr);
    size_t size = (made.bytes() / kAlignment + 1) * kAlignment;
    made.data.reset(std::aligned_alloc(kAlignment, size), std::free);
    if (!made.data) throw Error("there is no memory for a tensor " + spelled(made.shape));
    std::memset(made.data.get(), 0, size);
    return made;
  }

  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : shape) product *= size;
    return product;
  }
  size_t bytes() const { return static_cast<size_t>(count()) * dtype_named(dtype).bits / 8; }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data.get());
  }

  Tensor copy() const {
    Tensor made = zeros(dtype, shape);
    if (bytes()) std::memcpy(made.data.get(), data.get(), bytes());
    return made;
  }
};

// Everything before the tensors: names, dtypes, shapes and places.
inline std::string_view tensor_header(std::string_view member, const std::string& name) {
  uint64_t length = 0;
  if (member.size() >= 8) std::memcpy(&length, member.data(), 8);
  if (length < 2 || length > member.size() - 8) throw Error("member " + name + " is truncated; get the artifact again");
  return member.substr(0, 8 + length);
}

// The tensors of a member, padding left out, aliases included; `owner` keeps the member mapped.
inline std::map<std::string, Tensor> read_tensors(std::string_view member, const std::string& name,
                                                  const std::shared_ptr<void>& owner) {
  const std::string wrong = "member " + name + " is damaged: a tensor lies outside of it; get the artifact again";
  std::string_view head = tensor_header(member, name), body = member.substr(head.size());
  Json header = Json::parse(head.substr(8), "member " + name);
  std::map<std::string, Tensor> found;
  for (const auto& [key, item] : header.fields()) {
    if (key == "__metadata__" || key.rfind("__pad.", 0) == 0) continue;
    const Dtype* kind = nullptr;
    for (const Dtype& each : dtypes())
      if (item["dtype"].string() == each.safetensors) kind = &each;
    if (!kind) throw Error("member " + name + " has dtype " + item["dtype"].string() + ", which is not known");
    Shape shape;
    uint64_t count = kind->bits / 8;
    for (const Json& size : item["shape"].items()) {
      shape.push_back(size.whole());
      if (shape.back() < 0 || __builtin_mul_overflow(count, uint64_t(shape.back()), &count)) throw Error(wrong);
    }
    const auto& offsets = item["data_offsets"].items();
    if (offsets.size() != 2) throw Error(wrong);
    int64_t begin = offsets[0].whole(), end = offsets[1].whole();
    if (begin < 0 || end < begin || uint64_t(end) > body.size() || uint64_t(end - begin) != count) throw Error(wrong);
    void* start = const_cast<char*>(body.data()) + begin;
    if (count && reinterpret_cast<uintptr_t>(start) % kAlignment)
      throw Error("tensor " + key + " is not at a multiple of 64 bytes: the artifact was repacked; get it again");
    found.emplace(key, Tensor(kind->name, shape, std::shared_ptr<void>(owner, start)));
  }
  if (const Json& metadata = header["__metadata__"]; !metadata.null())
    for (const auto& [key, target] : metadata.fields())
      if (key.rfind("alias.", 0) == 0 && found.count(target.string())) found[key.substr(6)] = found[target.string()];
  return found;
}

}  // namespace graphopt
