// Arrays in files of numpy's format .npy, version 1.0.
#pragma once

#include <fstream>
#include <sstream>

#include "tensor.hpp"

namespace graphopt {

inline std::string npy_letters(const Dtype& kind) {
  if (kind.code == kDLBool) return "|b1";
  const char letter = kind.code == kDLFloat ? 'f' : kind.code == kDLInt ? 'i' : 'u';  // bits of what numpy lacks
  return std::string(kind.bits == 8 ? "|" : "<") + letter + std::to_string(kind.bits / 8);
}

// Of the dtype given, whose bits the file has to hold.
inline Tensor read_npy(const std::string& path, const std::string& dtype) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  content << file.rdbuf();
  const std::string data = content.str();
  if (data.size() < 10 || data.compare(0, 7, "\x93NUMPY\x01")) throw Error(path + " is no .npy file of version 1.0");
  size_t begin = 10 + uint8_t(data[8]) + 256 * uint8_t(data[9]);
  std::string head = data.substr(10, begin - 10);
  size_t open = head.find('('), close = head.find(')');
  if (head.find("'" + npy_letters(dtype_named(dtype)) + "'") == std::string::npos)
    throw Error(path + " does not hold " + dtype + ": " + head.substr(0, head.find(',')));
  const bool plain = head.find("'fortran_order': False") != std::string::npos;
  if (!plain || open == std::string::npos || close == std::string::npos)
    throw Error(path + " is not in C order; save numpy.ascontiguousarray(x)");
  Shape shape;
  std::istringstream sizes(head.substr(open + 1, close - open - 1));
  for (int64_t size; sizes >> size; sizes.ignore()) shape.push_back(size);
  Tensor made = Tensor::zeros(dtype, shape);
  if (begin > data.size() || made.bytes() != data.size() - begin) throw Error(path + " is truncated");
  std::memcpy(made.data.get(), data.data() + begin, made.bytes());
  return made;
}

inline void write_npy(const std::string& path, const Tensor& tensor) {
  std::string shape;
  for (int64_t size : tensor.shape) shape += std::to_string(size) + ",";
  std::string head = "{'descr': '" + npy_letters(dtype_named(tensor.dtype)) + "', 'fortran_order': False, 'shape': (" +
                     shape + "), }";
  head.resize((10 + head.size()) / 64 * 64 + 64 - 10 - 1, ' ');
  head += '\n';
  std::ofstream file(path, std::ios::binary);
  file << "\x93NUMPY\x01" << '\0' << char(head.size() % 256) << char(head.size() / 256) << head;
  file.write(tensor.as<char>(), static_cast<std::streamsize>(tensor.bytes()));
  if (!file.flush()) throw Error("cannot write " + path);
}

}  // namespace graphopt
