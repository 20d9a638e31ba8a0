// Calls into TVM's runtime through the C interface of tvm_ffi, so that any C++ compiler and standard library will do.
#pragma once

#include <tvm/ffi/c_api.h>

#include <utility>

#include "tensor.hpp"

namespace graphopt {

// A value of tvm_ffi; owns the object that it refers to.
class Value {
 public:
  Value() : any_{} {}
  explicit Value(TVMFFIAny owned) : any_(owned) {}
  Value(const Value& other) : any_(other.any_) {
    if (object()) TVMFFIObjectIncRef(any_.v_obj);
  }
  Value(Value&& other) noexcept : any_(std::exchange(other.any_, {})) {}
  Value& operator=(Value other) noexcept {
    std::swap(any_, other.any_);
    return *this;
  }
  ~Value() {
    if (object()) TVMFFIObjectDecRef(any_.v_obj);
  }

  Value(int64_t value) : any_{} {
    any_.type_index = kTVMFFIInt;
    any_.v_int64 = value;
  }
  Value(int value) : Value(int64_t{value}) {}
  Value(bool value) : Value(int64_t{value}) { any_.type_index = kTVMFFIBool; }
  Value(const char* text) : any_{} {  // which has to live as long as the value
    any_.type_index = kTVMFFIRawStr;
    any_.v_c_str = text;
  }
  Value(const std::string& text) : Value(text.c_str()) {}

  bool object() const { return any_.type_index >= kTVMFFIStaticObjectBegin; }
  bool none() const { return any_.type_index == kTVMFFINone; }
  int32_t type() const { return any_.type_index; }
  int64_t whole() const { return any_.v_int64; }
  TVMFFIAny any() const { return any_; }
  TVMFFIObject* handle() const { return any_.v_obj; }

  static Value of(void* handle, int32_t type) {
    TVMFFIAny any{};
    any.type_index = type;
    any.v_obj = static_cast<TVMFFIObject*>(handle);
    return Value(any);
  }

 private:
  TVMFFIAny any_;
};

// Raises the error that a call of the interface left behind.
[[noreturn]] inline void raise(const std::string& what) {
  void* error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  std::string text = "unknown reason";
  if (error) {
    const TVMFFIByteArray& message = reinterpret_cast<TVMFFIErrorCell*>(static_cast<TVMFFIObject*>(error) + 1)->message;
    text.assign(message.data, message.size);
    TVMFFIObjectDecRef(error);
  }
  throw Error(what + " failed: " + text.substr(0, text.find('\n')));
}

inline Value call_all(const Value& function, const std::string& what, const std::vector<Value>& arguments) {
  std::vector<TVMFFIAny> values;
  for (const Value& each : arguments) values.push_back(each.any());
  TVMFFIAny result{};
  if (TVMFFIFunctionCall(function.handle(), values.data(), static_cast<int32_t>(values.size()), &result)) raise(what);
  return Value(result);
}

inline Value global(const std::string& name) {
  TVMFFIByteArray text{name.data(), name.size()};
  void* found = nullptr;
  if (TVMFFIFunctionGetGlobal(&text, &found) || !found)
    throw Error("TVM's runtime has no function " + name + "; the libraries are not those that the folder was made with");
  return Value::of(found, kTVMFFIFunction);
}

// A function of a module, none where it has none of that name.
inline Value member(const Value& module, const std::string& name) {
  static const Value get = global("ffi.ModuleGetFunction");
  return call_all(get, "looking up " + name, {module, name, true});
}

inline Value call_member(const Value& module, const std::string& name, const std::vector<Value>& arguments) {
  Value function = member(module, name);
  if (function.none()) throw Error("a library has no function " + name + "; compile the artifact again");
  return call_all(function, name, arguments);
}

// The tensor over its memory, which it keeps.
inline Value to_device(const Tensor& tensor) {
  struct Managed {
    DLManagedTensor managed;
    Tensor tensor;
    Shape strides;
  };
  auto* owner = new Managed{{}, tensor, Shape(tensor.shape.size(), 1)};
  for (size_t axis = tensor.shape.size(); axis-- > 1;)
    owner->strides[axis - 1] = owner->strides[axis] * owner->tensor.shape[axis];
  const Dtype& kind = dtype_named(tensor.dtype);
  owner->managed.dl_tensor = {tensor.data.get(),
                              {kDLCPU, 0},
                              static_cast<int32_t>(tensor.shape.size()),
                              {kind.code, kind.bits, 1},
                              owner->tensor.shape.data(),
                              owner->strides.data(),
                              0};
  owner->managed.manager_ctx = owner;
  owner->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Managed*>(self->manager_ctx); };
  void* made = nullptr;
  if (TVMFFITensorFromDLPack(&owner->managed, kAlignment, 1, &made)) raise("taking over a tensor");
  return Value::of(made, kTVMFFITensor);
}

// A copy of a result in memory of the caller's.
inline Tensor from_device(const Value& value, const std::string& dtype) {
  const DLTensor* found = TVMFFITensorGetDLTensorPtr(value.handle());
  Tensor made = Tensor::zeros(dtype, Shape(found->shape, found->shape + found->ndim));
  if (made.bytes()) std::memcpy(made.data.get(), static_cast<char*>(found->data) + found->byte_offset, made.bytes());
  return made;
}

}  // namespace graphopt
